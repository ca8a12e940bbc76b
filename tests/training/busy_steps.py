"""How much longer steps take where another process has one of the cores: `python tests/training/busy_steps.py`.

A training step and a decoded token of a model of the quickstart's kind, by themselves and beside as many busy
processes as asked for, with the waiting of the `transformers-dsv3` command (`transformers_dsv3_cli/waiting.py`) and
with OpenMP's own. Takes a minute or two, on a machine that does nothing else.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time


def measure(rounds):
    """Prints medians in milliseconds: a training step, and a token."""
    import torch

    import transformers_dsv3

    config = transformers_dsv3.DeepseekV3Config(
        **{"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "moe_intermediate_size": 128},
        **{"num_hidden_layers": 4, "num_attention_heads": 4, "q_lora_rank": None, "kv_lora_rank": 128},
        **{"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 16},
        **{"num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    )
    torch.manual_seed(0)
    model = transformers_dsv3.DeepseekV3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 4096, (4, 128))

    def train():
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def decode():
        model.eval().generate(ids[:1, :16], max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=0)

    for run, units in ((train, 1), (decode, 40)):
        run()
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        print(1000 * statistics.median(seconds) / units)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=int, default=1, help="busy processes beside it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.rounds)
        return
    from transformers_dsv3_cli.waiting import ROUNDS

    print("load average", *(f"{value:.2f}" for value in os.getloadavg()))
    plain = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for name, environment in (("the command's", {"GOMP_SPINCOUNT": str(ROUNDS)}), ("OpenMP's own", {})):
        found = []
        for load in (0, options.load):
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load)]
            try:
                command = [sys.executable, __file__, "--measure", "--rounds", str(options.rounds)]
                said = subprocess.run(command, env=plain | environment, capture_output=True, text=True, check=True)
            finally:
                for process in busy:
                    process.kill()
                    process.wait()
            found.append([float(line) for line in said.stdout.split()])
        for what, quiet, loaded in zip(("training step", "token"), *found):
            print(
                f"{name:14} waiting, {what:14} {quiet:8.1f} ms, beside {options.load} busy: {loaded:8.1f} ms", end=""
            )
            print(f", {loaded / quiet:.1f} times")


if __name__ == "__main__":
    main()
