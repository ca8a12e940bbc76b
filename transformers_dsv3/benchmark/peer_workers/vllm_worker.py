"""Run by an interpreter that has vLLM: timings of its own DeepSeek class on the CPU."""

import argparse
import random
import time

import worker_lines


class Timings:
    """An engine in this process. With its prefix cache on, a context is computed once and then found again."""

    def __init__(self, arguments):
        import vllm
        from vllm.inputs import TokensPrompt

        self.version = f"vllm {vllm.__version__}"
        self.sampling, self.prompt = vllm.SamplingParams, TokensPrompt
        self.engine = vllm.LLM(
            arguments.checkpoint,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=arguments.positions,
            max_num_seqs=arguments.batch,
            max_num_batched_tokens=max(2048, arguments.positions),
            enable_prefix_caching=True,
            seed=arguments.seed,
        ).llm_engine
        self.random = random.Random(arguments.seed)
        self.vocab = arguments.vocab
        self.contexts = {}
        self.requests = 0

    def tokens(self, count):
        return [self.random.randrange(2, self.vocab) for _ in range(count)]

    def steps(self, prompts, new_tokens):
        """Times at which all prompts had their first, second, … new token, after the time of the start."""
        options = self.sampling(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            self.requests += 1
            self.engine.add_request(str(self.requests), self.prompt(prompt_token_ids=prompt), options)
        times, made = [time.perf_counter()], {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                made[output.request_id] = len(output.outputs[0].token_ids)
            now = time.perf_counter()
            while len(made) == len(prompts) and len(times) <= min(made.values()):
                times.append(now)
        return times

    def __call__(self, request):
        if request["what"] == "prefill":
            times = self.steps([self.tokens(request["tokens"])], 1)
            return {"seconds": times[1] - times[0], "units": 1}
        key = request["tokens"], request["batch"]
        if key not in self.contexts:
            self.contexts[key] = [self.tokens(request["tokens"]) for _ in range(request["batch"])]
            self.steps(self.contexts[key], 1)
        times = self.steps(self.contexts[key], request["new_tokens"] + 1)
        return {"seconds": (times[-1] - times[1]) / request["new_tokens"], "units": request["new_tokens"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("positions", type=int)
    parser.add_argument("batch", type=int)
    parser.add_argument("vocab", type=int)
    parser.add_argument("seed", type=int)
    parsed = parser.parse_args()
    worker_lines.serve(lambda: Timings(parsed))
