"""eval.py's flags: the plan that they make, the folders' defaults, which prompts are drawn."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval
from backbones import BACKBONES
from mini import drawbench
from tables import generation, methods, probe
from tables.generation import Request, prompt_sets
from tables.runs import RECORDING, SOURCES, Plan, RunName

ALWAYS = {"runs": (), "needs": "", "before": None}
VIT = str(Path(__file__).parent.parent / "mini" / "vit-mini")
CPU = ["--table", "2", "--device", "cpu"]


@pytest.mark.parametrize(
    "flags, cores, results, expected",
    [
        ([], 2, "results", {}),
        ([], 1, "results", {"jobs": 1}),
        (["--data", "drawn"], 8, "results/drawn", {"data": "drawn", "folder": Path("runs/tables-drawn")}),
        (["--weights", f"vit={VIT}"], 8, "results",
         {"folder": Path(f"runs/tables-mini-vit={VIT.replace('/', '_')}"),
          "sources": SOURCES["mini"] | {"vit": VIT}}),
        (["--weights", "paper"], 8, "results",
         {"folder": Path("runs/tables-mini-paper"), "sources": SOURCES["paper"]}),
        ("--runs x --results y --seeds 4,7 --jobs 3 --epochs 5 --lr 1".split(), 8, "y",
         {"folder": Path("x"), "seeds": (4, 7), "jobs": 3, "options": {"epochs": 5, "lr": 1.0}}),
    ],
)  # fmt: skip
def test_the_plan_that_flags_make(flags, cores, results, expected, monkeypatch: pytest.MonkeyPatch):
    written = []
    made = SimpleNamespace(**ALWAYS, write=lambda *where: written.append(where))
    monkeypatch.setattr(eval, "selected", lambda flag, kind: {(kind, 2): made})
    monkeypatch.setattr(eval, "train_missing", lambda plan, runs: [])
    monkeypatch.setattr(eval, "cores", lambda: cores)
    assert eval.main([*CPU, *flags]) == 0
    ((plan, where, kind, number),) = written
    default = {
        "data": "mini", "sources": SOURCES["mini"], "seeds": (0, 1, 2), "folder": Path("runs/tables-mini"),
        "jobs": 2, "device": "cpu", "options": {}, "drawbench": None,
        "second": None,
    }  # fmt: skip
    command = " ".join(["python eval.py", *CPU, *flags])
    assert vars(plan) == default | expected | {"command": command}
    assert (where, kind, number) == (Path(results), "table", 2)


def test_tables_and_figures_are_made_by_one_call(monkeypatch: pytest.MonkeyPatch):
    written = []
    for exhibits in eval.EXHIBITS.values():
        for number in exhibits:
            made = SimpleNamespace(**ALWAYS, write=lambda plan, where, *which: written.append(which))
            monkeypatch.setitem(exhibits, number, made)
    monkeypatch.setattr(eval, "train_missing", lambda plan, runs: [])
    assert eval.main(["--table", "2,7", "--figure", "9", "--device", "cpu"]) == 0
    assert written == [("table", 2), ("table", 7), ("figure", 9)]


def test_dakl_s_defaults_are_the_papers_best_row():
    method = methods.DaklMethod()
    assert (method.k, method.gamma, method.form) == (10_000, 1e-3, "exact")


def test_the_weights_of_each_backbone():
    assert SOURCES["mini"] == {
        "unet": "sd-mini", "vit": "vit-mini", "swin": "swin-mini", "clip": "clip-mini", "blip": "blip-mini",
        "blip2": "blip2-mini",
    }  # fmt: skip
    assert SOURCES["paper"].keys() == SOURCES["mini"].keys() == {*BACKBONES, "blip", "blip2"}


@pytest.mark.parametrize("flag, message", [
    ("bird=vit-mini", "--weights bird=vit-mini: must be mini or paper, or BACKBONE=SOURCE"),
    ("mini,clip=nothing", "nothing: no such file or folder, and no name of the registry"),
    ("blip=nothing", "nothing: no such file or folder"), ("vit=sd-1", "sd-1 has no vit; it has "),
])  # fmt: skip
def test_all_sources_are_checked_before_any_work(flag: str, message: str, monkeypatch, capsys):
    monkeypatch.setattr(eval, "train_missing", lambda plan, runs: pytest.fail("trained"))
    assert eval.main(["--table", "1", "--weights", flag]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line
    monkeypatch.setattr(eval.weights, "config", lambda *_: pytest.fail("a published source was fetched"))
    assert eval.sources_of("paper,clip=clip-l-14")["clip"] == "clip-l-14"


def test_arguments_that_cannot_be_read(capsys: pytest.CaptureFixture):
    for flags, line in (
        (["run", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["run", "--seeds", "5"], "--seeds: only --table, --figure and --vote use it"),
        (["run", "--data", "drawn", "--runs", "other"], "--data: only --table"),
        (["--table", "2", "--data", " "], "argument --data: must not be empty"),
        (["--table", "2", "--jobs", "0"], "argument --jobs: 0: must be a whole number"),
    ):
        with pytest.raises(SystemExit, match="2"):
            eval.main(flags)
        assert line in capsys.readouterr().err.splitlines()[-1]


def plan(folder: Path, **fields: object) -> Plan:
    default = {"data": "mini", "sources": SOURCES["mini"], "seeds": (0,), "jobs": 1, "device": "cpu"}
    return Plan(**default | {"folder": folder, "options": {}} | fields)


def test_a_phase_1_records_and_a_phase_2_reads_it(tmp_path: Path):
    """The runs whose cosines another run uses, and no others, record them."""
    for backbone in BACKBONES:
        for recipe in ("plain", "mlc", "mlc-cl", "cl", "lerac", "head-1"):
            run = RunName(backbone, recipe)
            fields = plan(tmp_path).fields(run, 3)
            assert fields.get("record_cosines", False) == (run in RECORDING)
            first = {"mlc-cl": "mlc", "cl": "plain"}.get(recipe)
            expected = str(tmp_path / f"{backbone}-{first}-seed3") if first else None
            assert fields.get("phase_1") == expected
            assert "phase_1" not in {k for k, v in vars(plan(tmp_path).config(run, 3)).items() if v}
    assert {RunName("vit", "mlc"), RunName("vit", "plain")} <= RECORDING


def test_the_prompts_that_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    """DrawBench from its file or the miniature's own, and evenly spaced test prompts of the seed's run."""
    monkeypatch.setattr(drawbench, "TRAINING_CANDIDATES", 10)  # 50,000 take seconds
    here = plan(tmp_path)
    views = probe.default_views()
    prompts = [*list(views)[:40], *(f"no scene {i}" for i in range(400))]
    rows = {"test": [{"prompt": p} for p in prompts], "train": [{"prompt": "a b c"}], "val": []}
    folder = here.run_folder(generation.RUN, 0) / "predictions"
    folder.mkdir(parents=True)
    (folder / "rows.json").write_text(json.dumps(rows))
    sets = prompt_sets(here, 0)
    own = drawbench.prompts({*prompts, "a b c"})
    assert sets["DrawBench"] == [Request(p.prompt, p.view) for p in own]
    chosen = [prompts[k * 440 // 200] for k in range(200)]
    assert sets["test prompts"] == [Request(prompt, views.get(prompt)) for prompt in chosen]

    (tmp_path / "bench.csv").write_text("Prompts,Category\na red cube,Colors\nan owl,Misc\n")
    with_file = plan(tmp_path, drawbench=tmp_path / "bench.csv")
    assert prompt_sets(with_file, 0)["DrawBench"] == [Request("a red cube"), Request("an owl")]
    assert "skipped" not in caplog.text
    paper = prompt_sets(plan(tmp_path, sources=SOURCES["paper"]), 0)
    assert "DrawBench" not in paper and "DrawBench is skipped" in caplog.text
    assert [r.prompt for r in paper["test prompts"]] == prompts[: generation.PROMPTS]
    assert all(r.view is None for r in paper["test prompts"])


def test_only_the_embedded_prompts_can_be_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "default_views", lambda: {"a": None, "b": None})
    assert probe.only_default_prompts("mini") and probe.only_default_prompts("drawn")
    for prompts, judged in ((["a"], True), (["a", "b"], True), (["a", "c"], False)):
        monkeypatch.setattr(probe.data, "read_pairs", lambda path, p=prompts: SimpleNamespace(prompts=p))
        assert probe.only_default_prompts("folder") is judged
