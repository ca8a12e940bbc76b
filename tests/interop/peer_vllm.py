"""Run by an interpreter that has vLLM: greedy tokens and the prompts' log-probabilities.

Takes a checkpoint, a JSON file with `prompts` (lists of token ids) and `new_tokens`, and a JSON file to write.
"""

import json
import sys
from pathlib import Path


def main():
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    checkpoint, request_file, output_file = sys.argv[1:]
    request = json.loads(Path(request_file).read_text())
    model = LLM(
        checkpoint, model_impl="transformers", dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4
    )
    outputs = model.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in request["prompts"]],
        SamplingParams(
            temperature=0, max_tokens=request["new_tokens"], ignore_eos=True, detokenize=False, prompt_logprobs=0
        ),
    )
    report = [
        {
            "tokens": list(output.outputs[0].token_ids),
            # The first token has no probability
            "logprobs": [
                at[token].logprob for at, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:])
            ],
        }
        for output in outputs
    ]
    Path(output_file).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
