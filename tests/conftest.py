"""Fixtures for every test: no network, one thread, a private cache, and no metric that is missing from the table."""

from __future__ import annotations

import faulthandler
import gc
import itertools
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads must not spin while others compute
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from chromium import WHY_NOT
from hypothesis import HealthCheck, settings

# also if PYTHONDONTWRITEBYTECODE is set: rewriting every test's asserts takes each worker 15 s of CPU
sys.dont_write_bytecode = False

# no test cuts the power, so data in the page cache is enough, and waiting for the disk would take a tenth of the suite's time
os.fsync = lambda _file: None

MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(MEMORY).free > 4e9:
    # the suite creates and removes ten thousand folders, and a disk's journal takes milliseconds for each
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


HUNG = 300.0  # seconds for one test plus a worker's wait for the next; twelve times that for a slow test
ERRORS = pytest.StashKey[int]()  # file descriptor of stderr outside any test's capture


def pytest_configure(config: pytest.Config) -> None:
    """Configure hypothesis: few examples by default, many in `make test-all`, and no deadline."""
    config.stash[ERRORS] = os.dup(2)
    many = config.getoption("markexpr") == ""
    settings.register_profile(
        "ours", max_examples=200 if many else 20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("ours")


def pytest_sessionstart(session: pytest.Session) -> None:
    """On a fresh clone, rewriting the asserts takes 15 s of CPU. Each worker starts at another file and reuses the others' work."""
    worker, files = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), sorted(Path(__file__).parent.rglob("test_*.py"))
    if worker == "gw0" or [session.config.rootpath / a for a in session.config.args] != [Path(__file__).parent]:
        return
    start = len(files) * int(worker[2:]) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    for file in files[start:]:
        sys.path.insert(0, str(file.parent))
        with suppress(Exception, pytest.skip.Exception):  # pytest reports it when it collects the file
            import_module(file.stem)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """If a worker hangs, in a test or before the next one, it prints its threads' stacks and exits, which fails the suite at once."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        limit = HUNG * (12 if item.get_closest_marker("slow") else 1)
        faulthandler.dump_traceback_later(limit, exit=True, file=item.config.stash[ERRORS])


def pytest_sessionfinish() -> None:
    faulthandler.cancel_dump_traceback_later()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests marked `device` run: cpu, cuda, mps or xpu")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Any:
    """The device on which tests marked `device` run their models."""
    import torch

    return torch.device(request.config.getoption("--device"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """List tests skipped for want of a browser and, after `make test-gpu`, the tests that ran there with their outcomes."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if WHY_NOT in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} tests or files were skipped: {WHY_NOT} (install chromium, or name one in CHROMIUM)"
        )
    kind = config.getoption("--device").split(":")[0]
    if kind == "cpu":
        return
    import torch

    from penchant.base.machine import device_name

    terminalreporter.section(f"on {device_name(kind)}, torch {torch.__version__}")
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            terminalreporter.write_line(f"{outcome:8}{report.duration:8.2f} s  {report.nodeid.split('/')[-1]}")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real data and models beside the repository. Tests that need them are skipped if they are absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no shared data beside the repository")
    return folder


NUMBER = itertools.count()
FROZEN = 0  # number of modules when the garbage collector's objects were last frozen


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Reset the number of threads, because a process forked by a later test would wait for threads that it does not have."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def _short_collections() -> Iterator[None]:
    """Freeze the million objects of torch and transformers, which each `gc.collect` would otherwise traverse."""
    global FROZEN
    yield
    if len(sys.modules) > FROZEN + 100:
        gc.collect()
        gc.freeze()
        FROZEN = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def _nobodys_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for module fixtures, which run before a test gets its own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp_path_factory.getbasetemp() / "caches" / "shared"))
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the cache to a folder of the test, so that no test uses the user's cache."""
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path_factory.getbasetemp() / "caches" / str(next(NUMBER))))


KEEPS = {"models": True, "fits": True}
REAL = ("models", "logprobs")  # folders of tests/ that test the loading itself


@pytest.fixture(scope="session", autouse=True)
def _models_are_read_once() -> Iterator[None]:
    """Read and probe model folders with the same bytes once per process, by the real code, and return copies after that.

    Runs of a sweep share models in the same way (`runs.sharing`), and tests/sweep shows that it does not change results.
    """
    import copy
    import hashlib

    import torch

    from penchant import plan
    from penchant.logprobs import Scorer, packing, reference
    from penchant.models import load

    kept: dict[str, tuple[Any, torch.Tensor]] = {}
    seen: set[str] = set()  # only models that are read a second time are kept, which most trained ones are not
    ways: dict[Any, Any] = {}
    real_load, real_way, real_fast = load._load, packing._first_right, packing._fast_is_right
    real_logps = reference.compute_logps

    def loaded(cfg: Any, path: str, device: torch.device, seed: int, *how: Any) -> Any:
        files = sorted(p for p in Path(path).iterdir() if p.is_file()) if Path(path).is_dir() else []
        small = files and sum(p.stat().st_size for p in files) <= 1e6
        if not KEEPS["models"] or not small or cfg.quantize != "none":
            return real_load(cfg, path, device, seed, *how)
        rest = (
            cfg.model_dump_json(exclude={"path", "tokenizer"}),
            str(device),
            seed if cfg.init == "random" else None,
            how,
        )
        sums = [(p.name, hashlib.sha256(p.read_bytes()).digest()) for p in files]
        key = hashlib.sha256(repr((rest, sums)).encode()).hexdigest()
        if key not in kept:
            before, model = torch.get_rng_state(), real_load(cfg, path, device, seed, *how)
            after = torch.get_rng_state()
            if key in seen and (cfg.init == "random" or torch.equal(before, after)):
                kept[key] = copy.deepcopy(model), after
            seen.add(key)
            model._kept = key
            return model
        model = copy.deepcopy(kept[key][0])
        model._kept = key
        model.config._name_or_path = model.name_or_path = path
        if cfg.init == "random":
            torch.set_rng_state(kept[key][1])
        return model

    def way_of(kind: str, model: Any, *asked: Any) -> Any:
        made_of = getattr(load.base_model_of(model), "_kept", None)
        if not KEEPS["models"] or made_of is None:
            return None
        with torch.no_grad():
            weights = tuple((n, p.dtype, float(p.double().sum())) for n, p in model.named_parameters())
        return (kind, made_of, type(model), weights, asked)

    def first_right(model: Any, *asked: Any) -> Any:
        key = way_of("way", model, *map(tuple, asked))
        if key is None or key not in ways:
            found = real_way(model, *asked)
            if key is None or found[0] is None:
                return found
            ways[key] = found
        return ways[key]

    def fast_is_right(scorer: Any) -> bool:
        key = way_of("fast", scorer.model, scorer.packing, scorer.own_attention, scorer.own_head)
        if key is None or key not in ways:
            right = real_fast(scorer)
            if key is None:
                return right
            ways[key] = right
        return bool(ways[key])

    def reference_logps(live: Any, trees: Any, *, tokens_per_step: int, progress: Any = None) -> Any:
        """Cache a frozen reference's log-probs of the same rows, as a user's cache would."""
        scorer, digest = live.scorer, hashlib.sha256()
        reference.hash_trees(digest, trees)
        plain = (type(live), type(scorer), live.off) == (reference.LiveReference, Scorer, nullcontext)
        how = (digest.digest(), tokens_per_step, live.side_by_side, scorer.fast, torch.get_num_threads())
        key = way_of("reference", scorer.model, scorer.packing, *scorer.how.values(), *how) if plain else None
        if key is None or key not in ways:
            found = real_logps(live, trees, tokens_per_step=tokens_per_step, progress=progress)
            if key is None:
                return found
            ways[key] = found
        return copy.deepcopy(ways[key])

    look = plan.memory_warning
    with pytest.MonkeyPatch.context() as patch:
        # every tiny run fits, and estimating it takes a twentieth of its time
        patch.setattr(plan, "memory_warning", lambda run: None if KEEPS["fits"] else look(run))
        patch.setattr(load, "_load", loaded)
        patch.setattr(packing, "_first_right", first_right)
        patch.setattr(packing, "_fast_is_right", fast_is_right)
        patch.setattr(reference, "compute_logps", reference_logps)
        yield


@pytest.fixture(autouse=True)
def _models_are_kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KEEPS, "models", not {*request.path.parts} & {*REAL})
    monkeypatch.setitem(KEEPS, "fits", "plan" not in request.path.parts)


LIVE = {"reports": False}


@pytest.fixture(scope="session", autouse=True)
def _no_live_reports() -> Iterator[None]:
    """Write no report.html during training unless a test uses `live_reports`: it takes a tenth of a tiny run's time."""
    from penchant.report import LiveReport

    write = LiveReport._write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveReport, "_write", lambda self, at_least: write(self, at_least) if LIVE["reports"] else None)
        yield


@pytest.fixture
def live_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs and sweeps of this test write their reports."""
    monkeypatch.setitem(LIVE, "reports", True)


@pytest.fixture(autouse=True)
def _known_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a run logs a metric that is not in `penchant.metrics.names`, other than a scheduled hyperparameter."""
    from penchant.losses import LOSSES
    from penchant.metrics.names import SPEED, metric
    from penchant.runfolder import MetricsLog

    write = MetricsLog.write
    fields = [(n, f) for spec in LOSSES.values() for n, f in spec.params.model_fields.items()]
    others = {m.name for m in SPEED} | {f.alias or n for n, f in fields}

    def checked(log: MetricsLog, row: Mapping[str, Any]) -> None:
        figures = row if "kind" in row else row.get("metrics", {})
        for name in (k.removesuffix("/ci") for k, v in figures.items() if isinstance(v, (float, list))):
            assert name.split("/")[-1] in others or metric(name).meaning, f"{name} is not in penchant.metrics.names"
            assert not (name.startswith("eval/") and metric(name).only == "training"), (
                f"{name} is not of training alone"
            )
        write(log, row)

    monkeypatch.setattr(MetricsLog, "write", checked)
