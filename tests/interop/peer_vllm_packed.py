"""Run by an interpreter that has vLLM: how it reads a compressed checkpoint's `quantization_config`.

Takes a JSON file with `config`, that entry, and `modules`: names of linear layers and heads, and `NAME.experts` of
routed experts. Writes for each the bits and the format that vLLM finds, null where it finds none, to another file.
"""

import json
import sys
from pathlib import Path


def main():
    request_file, output_file = sys.argv[1:]
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    request = json.loads(Path(request_file).read_text())
    config = CompressedTensorsConfig.from_config(request["config"])
    config._add_fused_moe_to_target_scheme_map()
    found = {}
    for name in request["modules"]:
        # By the layer's name, else that of its class, as vLLM calls those
        kind = "RoutedExperts" if name.endswith(".experts") else "LinearBase"
        if name.endswith(("lm_head", "embed_tokens")):
            kind = "ParallelLMHead" if name.endswith("lm_head") else "VocabParallelEmbedding"
        asked = f"{name}.0.gate_proj" if kind == "RoutedExperts" else name
        scheme = config.get_scheme_dict(type(kind, (), {})(), asked)
        found[name] = scheme and [scheme["weights"].num_bits, scheme["format"]]
    Path(output_file).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
