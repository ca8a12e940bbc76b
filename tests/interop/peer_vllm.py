"""Run by an interpreter that has vLLM: greedy tokens and the prompts' log-probabilities.

Takes a checkpoint, a JSON file with `prompts` (lists of token ids) and `new_tokens`, a JSON file to write, and
`--plugin` where the process is to import the plugin first, or `--bf16` for that dtype in place of fp32.
"""

import json
import sys
from pathlib import Path


def main():
    checkpoint, request_file, output_file, *options = sys.argv[1:]
    if "--plugin" in options:
        import transformers_dsv3
        from transformers_dsv3.models.dsv3.modeling_dsv3 import DeepseekV3Model

        assert transformers_dsv3.is_registered()

    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    request = json.loads(Path(request_file).read_text())
    model = LLM(
        checkpoint,
        model_impl="transformers",
        dtype="bfloat16" if "--bf16" in options else "float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        attention_backend="CPU_MLA",  # where the processor has AMX, vLLM takes a backend for bf16 alone
    )
    if "--plugin" in options:
        assert all(model.apply_model(lambda loaded: type(loaded.model) is DeepseekV3Model))
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
