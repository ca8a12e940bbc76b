// The chat page: no library, nothing from anywhere else, and text that a model wrote is never taken for HTML.

const $ = (id) => document.getElementById(id);
const KEPT = ["system", "temperature", "top_p", "max_tokens", "seed", "theme"];
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

let messages = []; // of the conversation, as the API takes them
let pictures = []; // of the message that is being written: names and data: URLs
const reads = new Map(); // what each model reads
let running = null; // the AbortController of the answer that is being written
let wroteLast = null; // the messages with the last answer, for its routing
let routed = null; // that, as the server told it

// Settings

function kept(store, name) {
  try {
    return store().getItem(`dsv3-${name}`) ?? "";
  } catch {
    return ""; // a browser that keeps nothing
  }
}

function keep(store, name, value) {
  try {
    store().setItem(`dsv3-${name}`, value);
  } catch {
    // it is there until the page is left
  }
}

const forGood = () => localStorage;
const forThisTab = () => sessionStorage;

function readSettings() {
  for (const name of KEPT) $(name).value = kept(forGood, name);
  $("aloud").checked = kept(forGood, "aloud") === "yes";
  $("key").value = kept(forThisTab, "key");
  showTheme();
}

function showTheme() {
  const theme = $("theme").value;
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  drawRouting();
}

for (const name of KEPT) $(name).addEventListener("change", () => keep(forGood, name, $(name).value));
$("aloud").addEventListener("change", () => keep(forGood, "aloud", $("aloud").checked ? "yes" : ""));
$("key").addEventListener("change", () => {
  keep(forThisTab, "key", $("key").value);
  loadModels();
});
$("theme").addEventListener("change", showTheme);
$("model").addEventListener("change", showModel);
$("open-settings").addEventListener("click", () => $("settings").showModal());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawRouting());

// What is said beside the conversation

function say(text) {
  $("status").textContent = text;
}

function complain(text) {
  $("error").textContent = text;
}

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, body, signal) {
  const options = { headers: headers(), signal };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  const response = await fetch(path, options);
  if (response.ok) return response;
  let told = `The server answers ${response.status}.`;
  try {
    told = (await response.json()).error.message;
  } catch {
    // not this server's own words
  }
  if (response.status === 401) {
    $("settings").showModal();
    $("key").focus();
  }
  throw new Error(told);
}

async function loadModels() {
  try {
    const { data } = await (await ask("v1/models")).json();
    $("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
    for (const { id, input_modalities: kinds } of data) reads.set(id, kinds ?? ["text"]);
    showModel();
    complain("");
  } catch (error) {
    complain(error.message);
  }
}

function showModel() {
  const name = $("model").value || "a model";
  $("model-name").textContent = name.split("/").filter(Boolean).pop();
  document.title = `Chat with ${$("model-name").textContent}`;
  $("add").hidden = !readsPictures();
}

// Pictures of the next message

function readsPictures() {
  return reads.get($("model").value)?.includes("image") ?? false;
}

function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function addPictures(files) {
  complain("");
  if (!readsPictures()) {
    complain("This model reads text alone.");
    return;
  }
  for (const file of files) {
    if (!file.type.startsWith("image/")) {
      complain(`${file.name} is no picture.`);
      continue;
    }
    try {
      pictures.push({ name: file.name || "Picture", url: await readFile(file) });
    } catch {
      complain(`${file.name} cannot be read.`);
    }
  }
  showPictures();
  say(`Pictures to be sent: ${pictures.map(({ name }) => name).join(", ") || "none"}.`);
  $("question").focus();
}

function picture({ name, url }) {
  return element("img", { src: url, alt: name });
}

function showPictures() {
  $("pictures").hidden = !pictures.length;
  $("pictures").replaceChildren(
    ...pictures.map((one, place) => {
      const remove = element("button", { type: "button", ariaLabel: `Remove ${one.name}` }, "Remove");
      remove.addEventListener("click", () => {
        pictures.splice(place, 1);
        showPictures();
        say(`${one.name} was removed.`);
        ($("pictures").querySelectorAll("button")[Math.min(place, pictures.length - 1)] ?? $("question")).focus();
      });
      return element("li", {}, picture(one), remove);
    }),
  );
}

$("add").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", async () => {
  await addPictures([...$("files").files]);
  $("files").value = ""; // so that the same file may be chosen again
});
document.addEventListener("paste", (event) => {
  if (!event.clipboardData?.files.length) return;
  event.preventDefault();
  addPictures([...event.clipboardData.files]);
});
document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.toggle("dropping", readsPictures());
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  if (!event.dataTransfer?.files.length) return;
  event.preventDefault(); // else the browser leaves the page for the file
  addPictures([...event.dataTransfer.files]);
});

// The conversation

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function addMessage(role) {
  $("empty").hidden = true;
  const text = element("div", { className: "text" });
  const article = element("article", { className: role }, element("h2", {}, role === "user" ? "You" : "Model"), text);
  $("log").append(article);
  return { article, text };
}

// Text with what stands between ``` in blocks of its own
function show(target, text) {
  const parts = text.split(/```[^\n`]*\n?/);
  target.replaceChildren(
    ...parts.map((part, place) => (place % 2 ? element("pre", {}, element("code", {}, part)) : part)),
  );
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function asked() {
  const system = $("system").value.trim();
  const body = {
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  if ($("model").value) body.model = $("model").value;
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  return body;
}

async function answer(sent) {
  const { article, text } = addMessage("assistant");
  const body = asked();
  const begun = performance.now();
  let first = null;
  let pieces = 0;
  let content = "";
  let thoughts = "";
  let usage = null;
  let reason = null;
  let thinking = null;
  running = new AbortController();
  busy(true);
  say("The model is answering.");
  try {
    const response = await ask("v1/chat/completions", body, running.signal);
    for await (const event of events(response)) {
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      const { content: more, reasoning_content: thought } = choice.delta;
      if (!more && !thought) continue;
      first ??= performance.now();
      pieces += 1;
      if (thought) {
        if (!thinking) {
          thinking = element("div", { className: "text" });
          text.before(element("details", { open: true }, element("summary", {}, "Reasoning"), thinking));
        }
        thoughts += thought;
        thinking.textContent = thoughts;
      }
      if (more) {
        content += more;
        show(text, content);
      }
      const seconds = (performance.now() - first) / 1000;
      if (seconds > 0.5) say(`The model is answering: ${(pieces / seconds).toFixed(1)} tokens a second.`);
      follow();
    }
  } catch (error) {
    if (error.name !== "AbortError") complain(error.message);
    reason = error.name === "AbortError" ? "stopped" : "failed";
  }
  running = null;
  busy(false);
  if (!content && !thoughts) {
    article.remove();
    if (reason === "failed" && sent.pictures.length) takeBack(sent); // else each later message would fail by them
    say(reason === "stopped" ? "Stopped." : "");
    return;
  }
  messages.push({ role: "assistant", content });
  const count = usage?.completion_tokens ?? pieces;
  const seconds = (performance.now() - (first ?? begun)) / 1000;
  const speed = count > 1 ? `, ${((count - 1) / seconds).toFixed(1)} tokens a second` : "";
  const ended = { length: ", cut at the most tokens", stopped: ", stopped", failed: ", broken off" }[reason] ?? "";
  const told = `${count} tokens, first after ${((first ?? begun) - begun).toFixed(0)} ms${speed}${ended}`;
  const tools = element("div", { className: "tools" }, element("span", {}, told));
  if (window.speechSynthesis) {
    const read = element("button", { type: "button" }, "Read aloud");
    read.addEventListener("click", () => speak(content));
    tools.append(read);
  }
  article.append(tools);
  say(`Answered: ${told}.`);
  if ($("aloud").checked) speak(content);
  wroteLast = [...body.messages, { role: "assistant", content }];
  routed = null;
  $("routing").hidden = false;
  if ($("routing").open) loadRouting();
  else showRouting();
}

function follow() {
  const below = document.documentElement.scrollHeight - innerHeight - scrollY;
  if (below < 200) scrollTo(0, document.documentElement.scrollHeight);
}

function busy(is) {
  $("log").setAttribute("aria-busy", String(is)); // so that an answer is read out when it is whole
  $("stop").hidden = !is;
  $("send").disabled = is;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if ((!question && !pictures.length) || running) return;
  complain("");
  const { article, text } = addMessage("user");
  text.textContent = question;
  article.append(...pictures.map(picture));
  const shown = pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  const asks = question ? [{ type: "text", text: question }] : [];
  messages.push({ role: "user", content: shown.length ? [...shown, ...asks] : question });
  const sent = { article, question, pictures };
  pictures = [];
  showPictures();
  $("question").value = "";
  scrollTo(0, document.documentElement.scrollHeight);
  answer(sent);
});

function takeBack(sent) {
  messages.pop();
  sent.article.remove();
  pictures = sent.pictures;
  showPictures();
  $("question").value = sent.question;
}

$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});

$("stop").addEventListener("click", () => {
  running?.abort();
  $("question").focus();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !$("settings").open) running.abort();
});

$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  pictures = [];
  showPictures();
  wroteLast = routed = null;
  $("log").replaceChildren();
  $("empty").hidden = false;
  $("routing").hidden = true;
  say("A new chat.");
  complain("");
  $("question").focus();
});

// Which experts the last answer went to

$("routing").addEventListener("toggle", () => {
  if ($("routing").open && !routed) loadRouting();
});

async function loadRouting() {
  if (!wroteLast) return;
  $("routing-said").textContent = "The model reads its answer again.";
  try {
    const body = { messages: wroteLast, add_generation_prompt: false };
    routed = await (await ask("v1/routing", body)).json();
    $("routing-said").textContent = `${routed.tokens} tokens, each to ${routed.experts_per_token} of ${routed.experts} experts a layer.`;
  } catch (error) {
    $("routing-said").textContent = error.message;
  }
  showRouting();
}

function showRouting() {
  $("routing-figure").hidden = !routed;
  $("routing-table").replaceChildren();
  if (!routed) return;
  const rows = routed.layers.map(({ layer, tokens_per_expert: counts }) => {
    const most = Math.max(...counts);
    const mean = counts.reduce((sum, one) => sum + one, 0) / counts.length;
    const cells = [counts.indexOf(most), most, counts.filter((one) => !one).length, `${Math.round((100 * mean) / most)} %`];
    return element("tr", {}, element("th", { scope: "row" }, String(layer)), ...cells.map((cell) => element("td", {}, String(cell))));
  });
  const titles = ["Layer", "Busiest expert", "Its tokens", "Unused experts", "Utilisation"];
  const top = element("tr", {}, ...titles.map((title) => element("th", { scope: "col" }, title)));
  $("routing-table").append(element("table", {}, element("thead", {}, top), element("tbody", {}, ...rows)));
  drawRouting();
}

function drawRouting() {
  if (!routed) return;
  const style = getComputedStyle(document.documentElement);
  const [cold, hot] = ["--cold", "--hot"].map((name) => parse(style.getPropertyValue(name).trim()));
  const colour = (share) => cold.map((from, place) => Math.round(from + (hot[place] - from) * Math.min(share, 1)));
  const heat = $("heat");
  const { layers, experts, tokens, experts_per_token: each } = routed;
  heat.width = experts;
  heat.height = layers.length;
  heat.style.height = `${Math.max(8, Math.min(24, 400 / layers.length)) * layers.length}px`;
  const mean = (tokens * each) / experts;
  const pixels = new Uint8ClampedArray(4 * experts * layers.length);
  layers.forEach(({ tokens_per_expert: counts }, row) =>
    counts.forEach((count, column) => pixels.set([...colour(count / mean / 3), 255], 4 * (row * experts + column))),
  );
  heat.getContext("2d").putImageData(new ImageData(pixels, experts, layers.length), 0, 0);
  heat.setAttribute("aria-label", `Heat map of ${layers.length} layers and ${experts} experts; the table below has its figures`);
  const scale = $("scale");
  const context = scale.getContext("2d");
  for (let place = 0; place < scale.width; place += 1) {
    context.fillStyle = `rgb(${colour(place / scale.width)})`;
    context.fillRect(place, 0, 1, scale.height);
  }
}

function parse(colour) {
  return [1, 3, 5].map((place) => parseInt(colour.slice(place, place + 2), 16));
}

// Voice, where the browser has it

function speak(text) {
  speechSynthesis.cancel();
  speechSynthesis.speak(new SpeechSynthesisUtterance(text));
}

function offerVoice() {
  $("aloud-label").hidden = !window.speechSynthesis;
  const Recognition = window.SpeechRecognition ?? window.webkitSpeechRecognition;
  if (!Recognition) return;
  let listening = null;
  $("listen").hidden = $("listen-note").hidden = false;
  $("listen").addEventListener("click", () => {
    if (listening) {
      listening.stop();
      return;
    }
    listening = Object.assign(new Recognition(), { lang: navigator.language, interimResults: true });
    const before = $("question").value;
    listening.onresult = ({ results }) => {
      const heard = [...results].map((result) => result[0].transcript).join("");
      $("question").value = before ? `${before} ${heard}` : heard;
    };
    listening.onerror = ({ error }) => complain(`Nothing was understood: ${error}.`);
    listening.onend = () => {
      listening = null;
      $("listen").setAttribute("aria-pressed", "false");
      say("");
      $("question").focus();
    };
    $("listen").setAttribute("aria-pressed", "true");
    say("Listening.");
    listening.start();
  });
}

readSettings();
offerVoice();
loadModels();
