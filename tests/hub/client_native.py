"""Run without the plugin: what users' scripts do with repositories of the plugin's, with Hugging Face's own functions.

Takes the folder to write `report.json` and `logits.pt` to. The environment names the Hub and the account.
"""

import json
import sys
from pathlib import Path

import torch
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline


class NotInstalled:
    """Makes a package what it is to somebody who does not have it."""

    def find_spec(self, name, path=None, target=None):
        if name == "transformers_dsv3":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def refusal(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main():
    sys.meta_path.insert(0, NotInstalled())
    folder = Path(sys.argv[1])
    report, logits = {}, {}
    ids = torch.arange(40)[None]

    def forward(model):
        with torch.no_grad():
            return model.eval()(ids).logits[0]

    snapshot = Path(snapshot_download("anna/model"))
    report["snapshot"] = sorted(path.name for path in snapshot.iterdir())
    report["card"] = ModelCard.load("anna/model").data.license
    report["config"] = json.loads(Path(hf_hub_download("anna/model", "config.json", revision="v1")).read_text())
    model = AutoModelForCausalLM.from_pretrained("anna/model")
    report["class"] = f"{type(model).__module__}.{type(model).__name__}"
    logits["model"] = forward(model)
    logits["v1"] = forward(AutoModelForCausalLM.from_pretrained("anna/model", revision="v1"))
    logits["private"] = forward(AutoModelForCausalLM.from_pretrained("anna/private"))
    report["private without a token"] = refusal(
        lambda: AutoConfig.from_pretrained("anna/private", token=False, cache_dir=folder / "empty")
    )
    tokenizer = AutoTokenizer.from_pretrained("anna/model")
    report["ids"] = tokenizer("def main(")["input_ids"]
    generated = pipeline("text-generation", model="anna/model")("def main(", max_new_tokens=8, do_sample=False)
    report["text"] = generated[0]["generated_text"]
    logits["adapter"] = forward(PeftModel.from_pretrained(model, "anna/adapter"))
    # Transformers finds the base model by the adapter's config
    logits["adapter alone"] = forward(AutoModelForCausalLM.from_pretrained("anna/adapter"))
    native = AutoModelForCausalLM.from_pretrained("anna/model")
    native.push_to_hub("anna/native", max_shard_size="60KB", private=True)
    tokenizer.push_to_hub("anna/native")
    # The code file is not asked for unless it is wanted, and then needs the package
    logits["with code"] = forward(AutoModelForCausalLM.from_pretrained("anna/with-code"))
    report["code without the package"] = refusal(
        lambda: AutoModelForCausalLM.from_pretrained("anna/with-code", trust_remote_code=True)
    )
    assert "transformers_dsv3" not in sys.modules
    torch.save(logits, folder / "logits.pt")
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
