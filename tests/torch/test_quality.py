"""The harness of `benchmarks/quality`: jobs, their file, tasks of one's own, tables; on a task of a second."""

import importlib
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unilora_core.methods import METHODS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OWN = '''
"""Which of two numbers is larger?"""
import torch
from quality.tasks import Data, Task
from torch import nn
import unilora_torch

def examples(n, seed):
    rng = torch.Generator().manual_seed(seed)
    return [(x, int(x[0] > x[1])) for x in torch.randn(n, 8, generator=rng)]

def collate(chosen, rng):
    return torch.stack([x for x, _ in chosen]), torch.tensor([y for _, y in chosen])

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16))
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.body(x))

def figures(model, chosen):
    x, y = collate(chosen, None)
    return {"accuracy": (model(x).argmax(-1) == y).float().mean().item()}

def attach(model, **options):
    return unilora_torch.attach(model, ["body.0", "body.2"], modules_to_save=["head"], **options)

TASK = Task(
    title="Larger", kind="numbers", metric="accuracy", higher=True,
    data=lambda: Data(examples(200, 0), examples(50, 1), examples(50, 2)), model=lambda folder: Net(), collate=collate,
    loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]), figures=figures, attach=attach,
    layers=("body.0", "body.2"), head=("head",), examples=64, epochs=2, batch=8, rate=1e-2, head_rate=1e-2,
    full_rate=1e-2,
)
'''


@pytest.fixture(scope="module")
def quality():
    sys.path.insert(0, str(BENCHMARKS))
    names = ("jobs", "methods", "plans", "report", "tasks", "training")
    yield type("quality", (), {name: importlib.import_module(f"quality.{name}") for name in names})
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def own(quality, tmp_path, monkeypatch):
    """A folder with the task, and results of its own."""
    (tmp_path / "larger.py").write_text(OWN, encoding="utf-8")
    monkeypatch.setattr(quality.jobs, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(quality.report, "FOLDER", tmp_path / "results")
    return quality.tasks.find("larger", [tmp_path])


def rows_of(quality):
    return quality.jobs.read("larger")


@pytest.mark.parametrize("method", ["uni-lora", "lora", "vera", "peft-lora", "full", "head", "none"])
def test_a_row_says_what_made_it_and_is_the_same_again(quality, own, tmp_path, method):
    job = quality.jobs.Job("larger", method, 0, 1e-2)
    row = quality.jobs.run_one(job, own, own.data(), tmp_path).row
    again = quality.jobs.run_one(job, own, own.data(), tmp_path).row
    assert row.figures == again.figures
    assert row.about["steps"] == (0 if method == "none" else 16)
    assert row.about["head"] == (0 if method == "none" else 34)
    D = 4 * (8 + 16 + 16 + 16)
    trained = {"uni-lora": D // 16, "lora": D, "peft-lora": D, "vera": 2 * 256 + 32, "full": 16 * 9 + 16 * 17}
    assert row.about["trained"] == trained.get(method, 0)
    assert (row.about["bytes"] > 0) == (method != "none")


def test_lora_here_is_pefts_lora(quality, own, tmp_path):
    """From the same A and B, the same losses: what is measured beside each other is the same method."""
    results = []
    for method in ("lora", "peft-lora"):
        model = (torch.manual_seed(0), own.model(tmp_path))[1]
        trained = quality.methods.adapt(model, own, method, 1e-2, 0, {})
        with torch.no_grad():
            if method == "lora":
                factors = [f.clone() for f in trained.model.unilora.factors().values()]
            else:
                named = [p for name, p in trained.model.named_parameters() if "lora_" in name]
                assert [p.shape for p in named] == [f.shape for f in factors]
                for parameter, factor in zip(named, factors, strict=True):
                    parameter.copy_(factor)
        pool = own.data().pool[:64]
        losses, _ = quality.training.fit(
            trained.model, trained.groups, pool, own.collate, own.loss, epochs=2, batch=8, seed=0
        )
        results.append(losses)
    assert results[0] == pytest.approx(results[1], abs=1e-5)
    assert results[0][-1] < results[0][0]


def test_the_loop_is_adamw_with_a_linear_schedule(quality):
    """Beside a loop written out."""
    data = [(torch.randn(3, generator=torch.Generator().manual_seed(i)), i % 2) for i in range(20)]
    first, second = (torch.nn.Linear(3, 2) for _ in range(2))
    second.load_state_dict(first.state_dict())
    collate = lambda chosen, rng: (torch.stack([x for x, _ in chosen]), torch.tensor([y for _, y in chosen]))  # noqa: E731
    loss_of = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    groups = [{"params": list(first.parameters()), "lr": 0.1}]
    losses, _ = quality.training.fit(first, groups, data, collate, loss_of, epochs=10, batch=4, seed=3)
    rng = quality.training.np.random.default_rng(3)
    order = [each for _ in range(10) for each in quality.training.batches(data, 4, rng, None)]
    optimizer, expected = torch.optim.AdamW(second.parameters(), lr=0.1, weight_decay=0.0), []
    for step, chosen in enumerate(order):
        optimizer.param_groups[0]["lr"] = 0.1 * min((step + 1) / 3, (50 - step) / 47)
        loss = loss_of(second, collate([data[i] for i in chosen], rng))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(second.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-6)


def test_batches_hold_every_example_once_and_lengths_that_are_alike(quality):
    rng = quality.training.np.random.default_rng(0)
    lengths = list(range(40))
    found = quality.training.batches(lengths, 4, rng, lambda n: n)
    assert sorted(i for batch in found for i in batch) == lengths
    assert all(max(batch) - min(batch) == 3 for batch in found)
    assert found != sorted(found)


def test_what_is_there_is_not_run_again_and_parts_share_it(quality, own, tmp_path):
    jobs = list(quality.jobs.judged("larger", ("uni-lora", ()), 1e-2))
    assert len(quality.jobs.run(jobs, own, own.data(), tmp_path, "0/2")) == 3
    assert len(quality.jobs.run(jobs, own, own.data(), tmp_path, "0/1")) == 2
    assert quality.jobs.run(jobs, own, own.data(), tmp_path) == []
    assert {row.job for row in rows_of(quality)} == set(jobs)


def test_the_best_rate_is_chosen_on_the_sweeps_seed(quality, own):
    def row(rate, value, seed=100):
        return quality.jobs.Row(quality.jobs.Job("larger", "lora", seed, rate), {"accuracy": value}, {})

    rows = [row(1, 0.5), row(2, 0.9), row(4, 0.9), row(8, math.nan), row(16, 1.0, seed=0)]
    assert quality.jobs.best_rate(rows, own, ("lora", ())) == 2
    lower = quality.report.Task(**{**vars(own), "higher": False})
    assert quality.jobs.best_rate(rows, lower, ("lora", ())) == 1
    with pytest.raises(quality.tasks.TaskError, match="Larger: vera has no sweep yet; run it with `sweep` first"):
        quality.jobs.best_rate(rows, own, ("vera", ()))


def test_the_page_is_made_from_the_lines(quality, own, tmp_path, monkeypatch):
    page = tmp_path / "evidence.md"
    page.write_text(f"before\n{quality.report.BEGIN}old\n{quality.report.END}after\n", encoding="utf-8")
    monkeypatch.setattr(quality.report, "PAGE", page)
    monkeypatch.setattr(quality.report, "RESULTS", tmp_path)
    for case in [("uni-lora", ()), ("uni-lora", (("rank", 2),)), ("lora", ()), ("head", ())]:
        quality.jobs.run(quality.jobs.judged("larger", case, 1e-2), own, own.data(), tmp_path)
    quality.jobs.run(quality.jobs.sweep("larger", own, ("lora", ())), own, own.data(), tmp_path)
    quality.report.write([tmp_path])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    runs = (tmp_path / "results" / "larger.md").read_text(encoding="utf-8")
    (line,) = [line for line in runs.splitlines() if line.startswith("| lora | 0.01")]
    values = [row.figures["accuracy"] for row in rows_of(quality) if row.job.method == "lora" and row.job.seed < 5]
    assert f"| {sum(values) / 5:.3f} ± " in line
    assert "| 100% |" in line
    assert "uni-lora, **untouched**" in runs
    assert "| uni-lora, rank = 2 |" in runs
    assert "| lora | 0.005 → " in runs
    (first,) = [line for line in text.splitlines() if line.startswith("| Larger: accuracy ↑ |")]
    begins, untouched, gain, larger, best, lora, *_ = first.split(" | ")[1:]
    assert begins == shown(quality, "head")
    assert untouched == best == shown(quality, "uni-lora")
    assert gain.endswith("%")
    assert (larger, lora) == ("–", shown(quality, "lora"))
    assert (tmp_path / "results" / "larger.png").stat().st_size > 1000


def shown(quality, method):
    values = [row.figures["accuracy"] for row in rows_of(quality) if row.job.case == (method, ()) and row.job.seed < 5]
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / math.sqrt(5):.3f}"


@pytest.mark.parametrize("plan", ["baselines", "shapes", "maps", "methods"])
def test_the_cases_of_a_plan_are_different_and_can_be_attached(quality, own, tmp_path, plan):
    layout = own.attach(own.model(tmp_path), rank=4).spec.layout
    cases = list(quality.plans.PLANS[plan](own, layout))
    assert len({(method, quality.jobs.options_of(options)) for method, options in cases}) == len(cases) > 5
    trained = {}
    for method, options in cases:
        made = quality.methods.adapt(own.model(tmp_path), own, method, 1e-2, 0, options)
        trained.setdefault(method, []).append(made.numbers)
    if plan == "methods":
        d = layout.size // 16
        assert all(min(numbers) <= d for method, numbers in trained.items() if method not in MORE)
        assert set(trained) == set(METHODS) - {"tinylora"}, "which has its own number"


MORE = "lora", "tied-lora", "vb-lora"
"""What cannot have as few numbers as Uni-LoRA."""


def test_a_plan_is_carried_out_and_goes_on(quality, own, tmp_path, monkeypatch):
    """Four rates on the sweep's seed, then the seeds that are judged, at the best; Uni-LoRA at the task's own, too."""
    monkeypatch.setitem(quality.plans.PLANS, "one", lambda _task, _layout: [("uni-lora", {}), ("none", {})])
    quality.plans.carry_out("one", "larger", own, tmp_path, "0/1", seeds=2)
    jobs = [row.job for row in rows_of(quality)]
    swept = sorted(job.rate for job in jobs if job.seed == quality.jobs.SWEEP)
    assert swept == [0.005, 0.01, 0.02, 0.04]
    best = quality.jobs.best_rate(rows_of(quality), own, ("uni-lora", ()))
    judged = {(job.rate, job.seed) for job in jobs if job.method == "uni-lora" and job.seed != quality.jobs.SWEEP}
    assert judged == {(rate, seed) for rate in (best, own.rate) for seed in range(2)}
    assert [job.seed for job in jobs if job.method == "none"] == [0]
    quality.plans.carry_out("one", "larger", own, tmp_path, "0/1", seeds=2)
    assert [row.job for row in rows_of(quality)] == jobs


def broken(line, text):
    return pytest.param(line, text, id=text[:20])


@pytest.mark.parametrize(
    ("line", "text"),
    [
        broken("no json", r"larger\.jsonl, line 2: no row of results \(JSONDecodeError: .*\); take the line away"),
        broken('{"protocol": 1}', r"line 2: no row of results \(KeyError: 'options'\)"),
        broken("[]", r"line 2: no row of results \(TypeError"),
        broken("OTHER", r"line 2: protocol 0, expected 2: its figures cannot be compared\. Take the file away"),
    ],
)
def test_a_line_that_is_no_row_is_refused_and_the_others_are_kept(quality, own, tmp_path, line, text):
    (job,) = list(quality.jobs.judged("larger", ("head", ()), 1e-2))[:1]
    quality.jobs.run([job], own, own.data(), tmp_path)
    path = tmp_path / "results" / "larger.jsonl"
    other = json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"protocol": 0})
    before = path.read_text(encoding="utf-8") + (other if line == "OTHER" else line) + "\n"
    path.write_text(before, encoding="utf-8")
    with pytest.raises(quality.tasks.TaskError, match=text):
        quality.jobs.run([job], own, own.data(), tmp_path)
    assert path.read_text(encoding="utf-8") == before


def test_tasks_and_data_that_are_not_there(quality, tmp_path, monkeypatch):
    (tmp_path / "empty.py").write_text("", encoding="utf-8")
    (tmp_path / "needy.py").write_text("import a_module_of_nobody", encoding="utf-8")
    with pytest.raises(quality.tasks.TaskError, match="needs a package that is not installed: pip install a_mod"):
        quality.tasks.find("needy", [tmp_path])
    with pytest.raises(quality.tasks.TaskError, match=r"no task 'nowhere'; there are .*sst2.* --tasks FOLDER"):
        quality.tasks.find("nowhere")
    with pytest.raises(quality.tasks.TaskError, match=r"empty\.py defines no TASK of class Task; see tasks/sst2\.py"):
        quality.tasks.find("empty", [tmp_path])
    monkeypatch.delenv("UNILORA_DATA", raising=False)
    with pytest.raises(quality.tasks.TaskError, match="data of 'sst2' are read from the folder that UNILORA_DATA"):
        quality.tasks.data_folder("sst2")
    monkeypatch.setenv("UNILORA_DATA", str(tmp_path))
    with pytest.raises(quality.tasks.TaskError, match="UNILORA_DATA holds no folder 'sst2'"):
        quality.tasks.data_folder("sst2")


def test_methods_that_are_not_there(quality, own, tmp_path):
    for method in ("lore", "peft-lore"):
        with pytest.raises(quality.tasks.TaskError, match=f"no method '{method}'"):
            quality.methods.adapt(own.model(tmp_path), own, method, 1e-2, 0, {})


def test_the_command_says_what_is_wrong_in_one_line():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "quality"), "run", "nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("quality: no task 'nowhere'; there are ")
