"""Platform tables, shipped, kept and measured."""

import json
import math
from dataclasses import asdict, replace
from datetime import date

import pytest

from smlt_tune import cli
from smlt_tune.backend import calibration, platform_tables
from smlt_tune.backend.calibration import calibrate, comparison
from smlt_tune.backend.platform_tables import (
    bends,
    check_home,
    keep_table,
    platform_table,
    read_core,
    read_table,
    shipped_table,
    table_path,
)
from smlt_tune.backend.platforms.base import InvocationResult, PlatformLimits, processor
from smlt_tune.backend.platforms.inline import InlinePlatform
from smlt_tune.backend.platforms.local import isolation
from smlt_tune.backend.resource_manager.physics import worker_bytes
from smlt_tune.backend.resource_manager.tables import PlatformTable, StoreTable
from smlt_tune.errors import InvalidInput, OutOfMemory, PlatformError, StorageFull, StoreUnavailable
from smlt_tune.runtime import probes

LAMBDA = PlatformLimits(128, 10_240, 900.0, 100)


class Named:
    """A platform that only knows what a table needs."""

    fingerprint = "here"

    def __init__(self, name="somewhere", limits=LAMBDA):
        self.name, self.limits = name, limits

    def vcpus(self, memory_mb):
        return memory_mb / 1769


class Scaled(Named):
    """One that says what its virtual CPUs are made of, as the local platform does."""

    scale, usable = 0.2125, 2.0

    def cores(self, memory_mb):
        return isolation.cores(memory_mb, self.scale, self.usable)


class TestShipped:
    @pytest.mark.parametrize("name", ["local", "inline", "aws-lambda", "generic"])
    def test_files_are_sound(self, name):
        core = platform_tables.load_core(name)
        assert core.stores["redis"].bandwidth > 0
        assert all(0 < share <= 1 for share in core.efficiency)

    def test_local_follows_how_the_platform_limits_at_every_size(self):
        platform = Scaled("local")
        table = shipped_table(platform)
        efficiency = platform_tables.load_core("local").efficiency
        for size in range(128, 10_241):
            threads = isolation.threads(size / 1769)
            expected = platform.cores(size) / platform.scale * efficiency[threads - 1]
            assert table.speed_at(size) == pytest.approx(expected, rel=1e-9)
        assert table.speed_at(1769) == 1.0

    def test_flops_and_handling_are_those_of_the_cores_behind_1769_mb(self):
        core = platform_tables.load_core("local")
        table = shipped_table(Scaled("local"))
        assert table.flops == pytest.approx(0.2125 * core.flops)
        assert table.handling_s == pytest.approx(core.handling_s / 0.2125)

    def test_a_function_has_no_more_than_the_machine(self):
        platform = Scaled("other")
        platform.scale, platform.usable = 1.0, 1.5
        table = shipped_table(platform)
        assert table.speed_at([884.5, 1769, 3537, 3538, 10_240]) == pytest.approx(
            [0.5, 1, 1, 1.5, 1.5]
        )

    def test_inline_is_as_fast_at_every_size(self):
        table = platform_table(InlinePlatform())
        assert set(table.speed_at(range(128, 10_241))) == {1.0}

    def test_lambda_has_its_documented_share_with_the_sizes_of_visible_cpus(self):
        table = shipped_table(Named("aws"))
        assert {1769, 3009, 5308, 7077, 8846} <= set(table.memory_mb)
        shares = [size / 1769 for size in table.memory_mb]
        assert table.speed == pytest.approx(shares, rel=1e-3)
        assert table.bandwidth == 75e6
        assert 1 <= table.start_s <= 4

    def test_an_unknown_platform_gets_its_own_law_and_says_it_was_not_measured(self):
        table = shipped_table(Named("mine"))
        assert table.measured == ""
        assert table.fingerprint == "here"
        assert table.speed_at([600, 1769, 3537, 3538, 10_240]) == pytest.approx(
            [600 / 1769, 1, 1, 2, 5]
        )

    def test_bends_are_the_ends_and_both_sides_of_every_jump(self):
        jumps = [s for k in (2, 3, 4, 5) for s in (math.ceil(1769 * k) - 1, math.ceil(1769 * k))]
        assert bends(Scaled()) == (128, 1769, *jumps, 10_240)
        assert bends(Named(limits=PlatformLimits(256, 1024, 900.0, 1))) == (256, 1024)


STORE = {"latency_s": 1e-3, "bandwidth": 1e9, "usd_per_hour": 0, "usd_per_request": 0}
CORE = {
    "schema": 1,
    "as_of": "2026-01-31",
    "sources": ["a page"],
    "flops": 1e10,
    "handling_s": 1e-9,
    "efficiency": [1.0, 0.9],
    "bandwidth": 1e8,
    "start_s": 1,
    "warm_start_s": 0,
    "stores": {"redis": STORE},
}
TABLE = PlatformTable(
    fingerprint="local:cgroup1:2cores:0.2125:A CPU @ 2.60GHz",
    memory_mb=(128, 1769, 10_240),
    speed=(0.07, 1.0, 1.5),
    flops=5e9,
    bandwidth=1e9,
    handling_s=4e-9,
    start_s=0.06,
    warm_start_s=0.005,
    stores={"redis": StoreTable(5e-5, 2e9)},
    measured="2026-11-22",
)


@pytest.mark.parametrize(
    ("changes", "mistakes"),
    [
        (
            {"flops": 0, "handling_s": -1, "bandwidth": "fast", "start_s": None, "as_of": "today"},
            [
                "flops must be a number above 0, not 0",
                "handling_s must be a number above 0, not -1",
                "bandwidth must be a number above 0, not 'fast'",
                "start_s must be a number of at least 0, not None",
                "as_of must be a date such as 2026-01-31, not 'today'",
            ],
        ),
        (
            {"efficiency": [1, True], "sources": [], "colour": "red", "stores": []},
            [
                "efficiency must be a list of numbers above 0, not [1, True]",
                "stores must be an object, not []",
                "sources must be a list of texts, not []",
                "colour is not known",
            ],
        ),
        (
            {"stores": {"redis": {**STORE, "bandwidth": 0, "port": 1}, "unix": 3, "s3": {}}},
            [
                "stores.redis.bandwidth must be a number above 0, not 0",
                "stores.redis.port is not known",
                "stores.unix must be an object, not 3",
                *(
                    f"stores.s3.{name} is missing"
                    for name in ("latency_s", "usd_per_hour", "usd_per_request", "bandwidth")
                ),
            ],
        ),
        ({"speed": {"128": 1}}, ["it must have either efficiency or speed"]),
        (
            {"efficiency": ..., "speed": {"0": 1, "x": 2}},
            ["speed must be numbers above 0 by size in MB, not {'0': 1, 'x': 2}"],
        ),
        ({"flops": ..., "stores": ...}, ["flops is missing", "stores is missing"]),
        ({"flops": math.nan}, ["flops must be a number above 0, not nan"]),
    ],
)
def test_every_mistake_in_a_shipped_table_is_told_at_once(changes, mistakes):
    document = {k: v for k, v in {**CORE, **changes}.items() if v is not ...}
    if "speed" in changes and "efficiency" not in changes:
        mistakes = mistakes[:1]
    with pytest.raises(InvalidInput) as refused:
        read_core(json.dumps(document), "mine.json")
    assert list(refused.value.mistakes) == [f"mine.json: {mistake}" for mistake in mistakes]


def test_a_sound_core_is_read():
    core = read_core(json.dumps(CORE), "mine.json")
    assert core.efficiency == (1.0, 0.9)
    assert core.stores == {"redis": StoreTable(1e-3, 1e9)}


class TestKept:
    def test_comes_back_exactly_and_replaces_what_was_kept_before(self, tmp_path):
        home = tmp_path / "new" / "home"
        assert read_table(home, TABLE.fingerprint) is None
        for table in (TABLE, replace(TABLE, speed=(0.06, 1.0, 0.1 + 0.2))):
            path = keep_table(table, home)
            assert read_table(home, TABLE.fingerprint) == table
        assert [*path.parent.iterdir()] == [path]

    def test_is_used_by_the_platform_of_its_fingerprint_only(self, tmp_path):
        keep_table(replace(TABLE, fingerprint="here"), tmp_path)
        table = platform_table(Named(), home=tmp_path)
        stores = {**shipped_table(Named()).stores, **TABLE.stores}
        assert table == replace(TABLE, fingerprint="here", stores=stores)
        assert set(stores) > set(TABLE.stores)
        assert platform_table(Named(), home=None).measured == ""
        other = Named()
        other.fingerprint = "there"
        assert platform_table(other, home=tmp_path) == shipped_table(other)

    def test_has_a_name_of_its_own_whatever_the_fingerprint_holds(self, tmp_path):
        marks = ["a/b", "a b", "a:b", "../a", "ä" * 300, ""]
        paths = {table_path(tmp_path, mark) for mark in marks}
        assert len(paths) == len(marks)
        assert {path.parent for path in paths} == {tmp_path / "platforms"}

    @pytest.mark.parametrize(
        ("changes", "mistakes"),
        [
            ({"memory_mb": [128, 128, 256]}, "memory_mb must be whole numbers above 0, ascending"),
            ({"memory_mb": [1.5]}, "memory_mb must be whole numbers above 0, ascending"),
            ({"speed": [1.0, 2.0]}, "3 sizes have 2 speeds"),
            ({"speed": [1.0, 2.0, 0]}, "speed must be a list of numbers above 0"),
            ({"fingerprint": "there"}, "it is of 'there', not of 'local:cgroup1"),
            ({"measured": ""}, "measured must be a date such as 2026-01-31"),
            ({"schema": 2}, "schema is 2; this version reads 1"),
            ({"more": 1}, "more is not known"),
        ],
    )
    def test_with_a_mistake_is_refused_with_what_to_do(self, tmp_path, changes, mistakes):
        path = keep_table(TABLE, tmp_path)
        path.write_text(json.dumps({"schema": 1, **asdict(TABLE), **changes}))
        with pytest.raises(InvalidInput) as refused:
            read_table(tmp_path, TABLE.fingerprint)
        [mistake] = refused.value.mistakes
        assert mistake.startswith(f"{path}: {mistakes}")
        assert mistake.endswith(": smlt calibrate measures a new one")

    @pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 10**5])
    def test_that_is_no_table_is_refused(self, tmp_path, content):
        path = keep_table(TABLE, tmp_path)
        path.write_bytes(content)
        with pytest.raises(InvalidInput, match=str(path)):
            read_table(tmp_path, TABLE.fingerprint)

    @pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
    def test_that_was_cut_is_refused(self, tmp_path, part):
        path = keep_table(TABLE, tmp_path)
        path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
        with pytest.raises(InvalidInput, match=r"is not JSON .* smlt calibrate measures a new one"):
            read_table(tmp_path, TABLE.fingerprint)

    def test_needs_a_folder(self, tmp_path):
        (tmp_path / "file").touch()
        for verb in (check_home, lambda home: keep_table(TABLE, home)):
            with pytest.raises(InvalidInput, match=r"^cannot use the folder .*: Not a directory$"):
                verb(tmp_path / "file")

    def test_stays_as_it_was_if_the_new_one_cannot_be_written(self, tmp_path, monkeypatch):
        path = keep_table(TABLE, tmp_path)

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(platform_tables.os, "fsync", full)
        with pytest.raises(StorageFull, match=rf"^cannot write {path}: No space left on device$"):
            keep_table(replace(TABLE, flops=1.0), tmp_path)
        assert [*path.parent.iterdir()] == [path]
        assert read_table(tmp_path, TABLE.fingerprint) == TABLE


class Truth:
    """Stands for a fleet on a machine whose figures are known. One sample of three is bad."""

    CORE_STEPS, EFFICIENCY, TOO_SMALL = 40.0, {1: 1.0, 2: 0.8, 3: 0.6, 4: 0.5, 5: 0.4}, 700
    LINK, STORE, CPU_PER_BYTE, LATENCY = 2e9, 3e9, 1e-9, 2e-4
    settled_usd = 0.25
    fleets = ()

    def __init__(self, *, platform, parameter_store, policy):
        self.platform, self.url = platform, parameter_store
        self.calls = []
        type(self).fleets = (*self.fleets, self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, config, *, workers, memory_mb):
        self.calls.append((function, workers, memory_mb))
        self.platform.invoke((memory_mb, len(self.calls) % 2), lambda result: None)
        disturbed = 3.0 if self.calls.count(self.calls[-1]) % 3 == 1 else 1.0
        self.value = getattr(self, f"_{function.__name__}")(workers, memory_mb, disturbed)
        self.too_small = memory_mb < self.TOO_SMALL
        return self

    def result(self):
        if self.too_small:
            raise OutOfMemory("too small")
        return self

    status, reason = "finished", ""

    def _train(self, workers, memory_mb, disturbed):
        cores = self.platform.platform.cores(memory_mb)
        efficiency = self.EFFICIENCY[isolation.threads(memory_mb / 1769)]
        cpu_s = disturbed * 100 / (self.CORE_STEPS * efficiency)
        return {"steps": 100, "cpu_s": cpu_s, "wall_s": cpu_s / cores}

    def _transfer(self, workers, memory_mb, disturbed):
        moved = 1e9 * workers
        cpu_s = self.CPU_PER_BYTE * moved
        wall_s = cpu_s + moved / self.LINK if workers == 1 else moved / self.STORE
        wall_s *= disturbed
        return {
            "latency_s": disturbed * self.LATENCY,
            "bytes": moved,
            "cpu_s": cpu_s,
            "wall_s": wall_s,
        }

    def _synchronise(self, workers, memory_mb, disturbed):
        moved = worker_bytes(probes.GRADIENT_BYTES, workers)
        return {"cpu_s": disturbed * self.CPU_PER_BYTE * moved}


class Starting(Scaled):
    """Starts of even calls are cold."""

    def invoke(self, what, on_done):
        on_done(InvocationResult("x", "returned", 1.0, cold=what[1] == 0, start_s=what[1] or 2.5))


@pytest.fixture
def truth(monkeypatch):
    monkeypatch.setattr(calibration, "Fleet", Truth)
    monkeypatch.setattr(Truth, "fleets", ())
    return Truth


class TestCalibrate:
    @pytest.mark.parametrize("scale", [0.2125, 0.4])
    def test_recovers_the_truth_whoever_else_uses_the_machine(self, truth, scale):
        platform = Starting()
        platform.scale = scale
        said = []
        table = calibrate(platform, say=said.append)
        reference = platform.cores(1769)
        for size in range(700, 10_241):
            efficiency = truth.EFFICIENCY[isolation.threads(size / 1769)]
            expected = platform.cores(size) * efficiency / reference
            assert table.speed_at(size) == pytest.approx(expected, rel=1e-9)
        assert table.speed_at(128) == pytest.approx(128 / 1769)
        assert table.flops == pytest.approx(truth.CORE_STEPS * reference * probes.STEP_FLOPS)
        assert table.bandwidth == pytest.approx(truth.LINK)
        assert table.handling_s == pytest.approx(truth.CPU_PER_BYTE / reference)
        assert (table.start_s, table.warm_start_s) == (2.5, 1.0)
        assert table.stores == {"redis": StoreTable(truth.LATENCY, pytest.approx(truth.STORE))}
        assert date.fromisoformat(table.measured)
        assert table.fingerprint == "here"
        assert said[-1] == "this has cost 0.250000 USD"
        assert "619 MB is too small for training" in said

    def test_measures_every_store_once_and_speed_with_the_first(self, truth, valkey):
        urls = {"a": valkey.url, "b": valkey.unix_url}
        table = calibrate(Starting(), parameter_stores=urls)
        assert set(table.stores) == {"redis", "unix"}
        assert [fleet.url for fleet in truth.fleets] == list(urls.values())
        first, second = ({call[0] for call in fleet.calls} for fleet in truth.fleets)
        assert first == second | {probes.train}
        assert probes.train not in second

    def test_a_store_that_does_not_answer_is_told_before_anything_runs(
        self, truth, valkey, monkeypatch
    ):
        monkeypatch.setattr(calibration, "FIRST_TRY_S", 0.2)
        urls = {"a": valkey.url, "b": "unix:///nowhere"}
        with pytest.raises(StoreUnavailable, match=r"unix:///nowhere did not answer"):
            calibrate(Starting(), parameter_stores=urls)
        assert truth.fleets == ()

    def test_one_function_at_a_time_is_enough(self, truth):
        table = calibrate(Starting(limits=replace(LAMBDA, concurrency=1, max_workers=1)))
        assert {call[1] for call in truth.fleets[0].calls} == {1}
        assert table.handling_s == pytest.approx(truth.CPU_PER_BYTE / 0.2125)

    def test_without_room_for_training_it_says_so(self, truth):
        platform = Starting(limits=replace(LAMBDA, max_memory_mb=512))
        with pytest.raises(PlatformError, match="functions of no size had memory enough"):
            calibrate(platform)

    def test_a_job_that_was_stopped_ends_it(self, truth, monkeypatch):
        monkeypatch.setattr(Truth, "status", "stopped")
        monkeypatch.setattr(Truth, "reason", "the fleet was closed")
        with pytest.raises(PlatformError, match="was stopped: the fleet was closed"):
            calibrate(Starting())

    @pytest.mark.parametrize(
        ("options", "mistakes"),
        [
            (
                {
                    "seconds": 0,
                    "rounds": 0,
                    "parameter_stores": {"a": "redis://a", "b": "redis://:secret@b"},
                },
                [
                    "parameter store 'b': another one of kind 'redis' was given",
                    "seconds=0: must be a positive number",
                    "rounds must be a whole number of at least 1, not 0",
                ],
            ),
            ({"seconds": math.inf}, ["seconds=inf: must be a positive number"]),
        ],
    )
    def test_lists_every_mistake_before_anything_runs(self, truth, options, mistakes):
        with pytest.raises(InvalidInput) as refused:
            calibrate(Starting(), **options)
        assert list(refused.value.mistakes) == mistakes
        assert truth.fleets == ()


def check_measured(table, platform):
    assert table.fingerprint == platform.fingerprint
    assert table.memory_mb[0] == 128
    assert table.memory_mb[-1] == 10_240
    assert table.speed_at(1769) == pytest.approx(1.0)
    for value in (table.flops, table.bandwidth, table.handling_s, table.start_s, *table.speed):
        assert 0 < value < math.inf
    [store] = table.stores.values()
    assert store.latency_s > 0
    assert store.bandwidth > 0


def test_real_functions_are_measured(platform, tmp_path):
    table = calibrate(platform, seconds=1.0, rounds=1)
    check_measured(table, platform)
    assert table.speed_at(619) < 0.8
    keep_table(table, tmp_path)
    assert platform_table(platform, home=tmp_path).speed == table.speed


def test_inline_is_measured(valkey):
    with InlinePlatform() as inline:
        table = calibrate(inline, seconds=0.5, rounds=1, parameter_stores={"own": valkey.unix_url})
        check_measured(table, inline)
    assert set(table.stores) == {"unix"}


def test_the_probe_does_the_operations_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    step = probes.training_step()
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == probes.STEP_FLOPS


def test_a_comparison_says_what_differs_and_what_is_new():
    other = replace(TABLE, flops=2.5e9, stores={})
    rows = {row[0]: row[1:] for row in comparison(TABLE, other)}
    assert rows["training, 1,769 MB"] == ("5 GFLOP/s", "2.5 GFLOP/s", "+100 %")
    assert rows["redis: small request"] == ("0.05 ms", "-", "-")
    assert rows["speed at 10,240 MB"][2] == "+0 %"


class TestFingerprint:
    def test_names_the_cpu_and_what_limits_functions(self, platform):
        isolation_, cores = platform.isolation, platform.cores(1769)
        assert platform.fingerprint.startswith(f"local:{isolation_}:")
        assert platform.fingerprint.endswith(f"cores:{cores:.4g}:{processor()}")

    def test_the_cpu_is_named_in_one_line(self, tmp_path):
        (tmp_path / "cpuinfo").write_text(
            "processor : 0\nmodel name\t: A  CPU @ 2.6\nmodel name: B"
        )
        assert processor(tmp_path / "cpuinfo") == "A CPU @ 2.6"
        assert processor(tmp_path / "none")


class TestCommand:
    @pytest.fixture
    def calibrated(self, monkeypatch):
        given = []

        def fake(platform, **options):
            given.append({"platform": platform.name, **options})
            options["say"]("line of [progress]")
            return replace(TABLE, fingerprint=platform.fingerprint)

        monkeypatch.setattr(calibration, "calibrate", fake)
        return given

    def test_keeps_the_table_where_it_was_told(self, calibrated, tmp_path, capsys):
        arguments = ["--platform", "inline", "--home", str(tmp_path), "--seconds", "5"]
        assert cli.main(["calibrate", *arguments, "--parameter-store", "unix:///a"]) == 0
        [given] = calibrated
        assert (given["platform"], given["seconds"]) == ("inline", 5.0)
        assert list(given["parameter_stores"].values()) == ["unix:///a"]
        kept = platform_table(InlinePlatform(), home=tmp_path)
        assert kept.measured == "2026-11-22"
        out = capsys.readouterr().out
        assert "line of [progress]" in out
        assert "5 GFLOP/s" in out
        assert f"kept in {table_path(tmp_path, kept.fingerprint)}" in out

    def test_keeps_it_in_the_users_folder(self, calibrated, tmp_path, monkeypatch):
        monkeypatch.setenv("SMLT_HOME", str(tmp_path / "own"))
        assert cli.main(["calibrate", "--platform", "inline"]) == 0
        monkeypatch.delenv("SMLT_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cli.main(["calibrate", "--platform", "inline"]) == 0
        assert [*(tmp_path / "own" / "platforms").iterdir()]
        assert [*(tmp_path / ".smlt" / "platforms").iterdir()]

    def test_takes_the_platform_of_a_sweep_file(self, calibrated, tmp_path, capsys):
        (tmp_path / "code.py").write_text("def train(config): pass")
        (tmp_path / "sweep.yaml").write_text(
            "name: tiny\ntrain: code.py:train\nmetric: accuracy\ntrials: 4\n"
            "space: {x: {float: [0.1, 0.9]}}\nplatform: inline\n"
        )
        arguments = ["calibrate", "--home", str(tmp_path), str(tmp_path / "sweep.yaml")]
        assert cli.main(arguments) == 0
        assert calibrated[0]["platform"] == "inline"
        assert cli.main(["calibrate", str(tmp_path / "none.yaml")]) == 2

    def test_refuses_a_folder_that_it_could_not_write_to_before_it_measures(
        self, calibrated, tmp_path, capsys
    ):
        (tmp_path / "file").touch()
        arguments = ["calibrate", "--platform", "inline", "--home", str(tmp_path / "file")]
        assert cli.main(arguments) == 2
        assert "smlt: cannot use the folder" in capsys.readouterr().err
        assert calibrated == []

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--seconds", "0"],
            ["--seconds", "x"],
            ["--platform", "moon"],
            ["a", "--platform", "local"],
        ],
    )
    def test_refuses_bad_arguments(self, calibrated, arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["calibrate", *arguments])
        assert ended.value.code == 2
        assert calibrated == []
