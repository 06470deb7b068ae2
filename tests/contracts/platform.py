"""What every platform must do; a class for what all can and one for each thing that some can.

Subclasses give a fixture ``make``, which takes options of the platform and returns one whose entry
is :data:`tests.contracts.platform_functions.ENTRY`. It closes what it has made. Nothing is asserted
about how long something takes; :data:`PATIENCE_S` only bounds how long a broken platform hangs.
"""

import hashlib
import itertools
import queue
import threading

import pytest

from smlt_tune.backend.platforms.base import Cancels, Invocation
from smlt_tune.errors import InvalidInput, PlatformError, Throttled
from tests.contracts.platform_functions import order

#: After this a platform is taken to hang, seconds.
PATIENCE_S = 60.0

_ids = itertools.count()


class Call:
    """One invocation and what became of it."""

    def __init__(self, platform, payload, *, memory_mb=256, timeout_s=60.0, log_path=None, name=""):
        self.invocation = Invocation(
            name or f"call-{next(_ids)}", memory_mb, timeout_s, payload, log_path
        )
        self.told = queue.Queue()
        platform.invoke(self.invocation, self.told.put)

    def result(self):
        result = self.told.get(timeout=PATIENCE_S)
        assert self.told.empty()
        assert result.invocation_id == self.invocation.invocation_id
        return result


def call(platform, do, *, memory_mb=256, timeout_s=60.0, log_path=None, **arguments):
    return Call(
        platform,
        order(do, **arguments),
        memory_mb=memory_mb,
        timeout_s=timeout_s,
        log_path=log_path,
    )


class PlatformContract:
    """What all platforms do."""

    def test_equal_platforms_have_one_fingerprint(self, make):
        mark = make().fingerprint
        assert mark == make().fingerprint
        assert mark.startswith(make().name)

    def test_returns(self, make):
        platform = make()
        result = call(platform, "nothing").result()
        assert result.ending == "returned"
        assert result.deliveries == 1
        assert result.detail == ""
        assert result.billed_s >= 0.001
        assert result.start_s >= 0

    def test_the_error_of_a_function_is_a_crash_with_its_message(self, make):
        result = call(make(), "fail", message="no such luck").result()
        assert result.ending == "crashed"
        assert result.detail.splitlines()[0] == "ValueError: no such luck"
        assert "platform_functions.py" in result.detail

    def test_leaving_the_interpreter_is_a_crash(self, make):
        result = call(make(), "leave", code=3).result()
        assert result.ending == "crashed"
        assert result.detail.splitlines()[0] == "SystemExit: 3"

    def test_the_platform_goes_on_after_a_crash(self, make):
        platform = make()
        assert call(platform, "fail", message="x").result().ending == "crashed"
        assert call(platform, "nothing").result().ending == "returned"

    def test_throttles_at_the_concurrency_limit(self, make, tmp_path):
        platform = make(concurrency=1)
        gate = tmp_path / "gate"
        first = call(platform, "wait_for", path=str(gate))
        before = platform.bill().requests
        with pytest.raises(Throttled, match="wait until"):
            call(platform, "nothing")
        assert platform.bill().requests == before
        gate.touch()
        assert first.result().ending == "returned"
        assert call(platform, "nothing").result().ending == "returned"

    def test_the_bill_is_the_sum_of_the_results(self, make):
        platform = make()
        assert (platform.bill().gb_s, platform.bill().requests) == (0, 0)
        sizes = (256, 512, 300)
        results = [
            call(platform, do, memory_mb=memory_mb, **arguments).result()
            for memory_mb, (do, arguments) in zip(
                sizes,
                [("burn", {"seconds": 0.05}), ("nothing", {}), ("fail", {"message": "x"})],
                strict=True,
            )
        ]
        bill = platform.bill()
        expected = sum(mb / 1024 * r.billed_s for mb, r in zip(sizes, results, strict=True))
        assert bill.gb_s == pytest.approx(expected, rel=1e-9)
        assert bill.requests == 3
        assert all(r.billed_s * 1000 == pytest.approx(round(r.billed_s * 1000)) for r in results)

    def test_refuses_what_is_out_of_range_listing_every_mistake(self, make):
        platform = make()
        limits = platform.limits
        with pytest.raises(InvalidInput) as caught:
            call(platform, "nothing", memory_mb=limits.min_memory_mb - 1, timeout_s=0)
        assert caught.value.mistakes == (
            f"memory_mb={limits.min_memory_mb - 1}: must be an integer from "
            f"{limits.min_memory_mb} to {limits.max_memory_mb}",
            f"timeout_s=0: must be positive and at most {limits.time_limit_s:g}",
        )
        for memory_mb in (limits.max_memory_mb + 1, 256.0, True, None):
            with pytest.raises(InvalidInput, match="memory_mb"):
                call(platform, "nothing", memory_mb=memory_mb)
        for timeout_s in (limits.time_limit_s + 1, float("nan"), float("inf"), -1, "1"):
            with pytest.raises(InvalidInput, match="timeout_s"):
                call(platform, "nothing", timeout_s=timeout_s)
        assert platform.bill().requests == 0

    def test_virtual_cpus_follow_memory(self, make):
        platform = make()
        assert platform.vcpus(1769) == pytest.approx(1.0)
        assert platform.vcpus(3538) == pytest.approx(2.0)

    def test_on_done_may_invoke_and_may_raise(self, make):
        platform = make()
        told = queue.Queue()

        def again(result):
            told.put(result)
            platform.invoke(Invocation("second", 256, 60.0, order("nothing")), told.put)
            raise RuntimeError("from on_done")

        platform.invoke(Invocation("first", 256, 60.0, order("nothing")), again)
        ids = [told.get(timeout=PATIENCE_S).invocation_id for _ in range(2)]
        assert ids == ["first", "second"]

    def test_is_called_from_several_threads(self, make):
        platform = make()
        told = queue.Queue()

        def work(who):
            for number in range(5):
                invocation = Invocation(f"{who}-{number}", 256, 60.0, order("nothing"))
                while True:
                    try:
                        platform.invoke(invocation, told.put)
                    except Throttled:
                        threading.Event().wait(0.002)
                    else:
                        break

        threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        results = [told.get(timeout=PATIENCE_S) for _ in range(20)]
        assert {r.ending for r in results} == {"returned"}
        assert len({r.invocation_id for r in results}) == 20
        assert platform.bill().requests == 20
        assert told.empty()

    def test_close_is_idempotent_and_final(self, make):
        platform = make()
        platform.close()
        platform.close()
        with pytest.raises(PlatformError, match="closed"):
            call(platform, "nothing")


class ProcessContract:
    """Functions are processes: they die alone."""

    def test_a_killed_function_is_a_crash(self, make):
        platform = make()
        result = call(platform, "kill").result()
        assert result.ending == "crashed"
        assert result.detail == "killed by signal 9 (SIGKILL)"
        assert call(platform, "nothing").result().cold

    def test_an_exit_is_a_crash(self, make, tmp_path):
        log = tmp_path / "log"
        result = call(make(), "leave_at_once", code=7, log_path=log).result()
        assert result.ending == "crashed"
        assert result.detail == "exited with code 7 before it returned"
        assert log.read_text() == "last words\n"

    def test_close_ends_running_functions(self, make):
        platform = make()
        running = [call(platform, "wait") for _ in range(2)]
        platform.close()
        for each in running:
            result = each.result()
            assert result.ending == "cancelled"
            assert result.detail == "the platform was closed"

    def test_a_forked_child_that_returns_too_is_not_taken_for_the_function(self, make):
        platform = make()
        for cold in (True, False):
            result = call(platform, "fork_and_return").result()
            assert (result.ending, result.cold) == ("returned", cold)

    def test_payloads_arrive_as_they_were_sent(self, make, tmp_path):
        log = tmp_path / "log"
        platform = make()
        payload = bytes(range(256)) * 12_000  # 3 MB
        assert Call(platform, payload, log_path=log).result().ending == "returned"
        assert Call(platform, b"", log_path=log).result().ending == "returned"
        expected = [hashlib.sha256(data).hexdigest() for data in (payload, b"")]
        assert log.read_text().split() == expected


class LogContract:
    """Output goes to the invocation's log."""

    def test_output_of_each_invocation_goes_to_its_log(self, make, tmp_path):
        platform = make()
        logs = [tmp_path / name for name in ("a", "b")]
        for log, text in zip(logs, ("one", "two"), strict=True):
            call(platform, "say", text=text, error=f"{text}!", log_path=log).result()
        assert logs[0].read_text() == "one\none!\nchild of one\n"
        assert logs[1].read_text() == "two\ntwo!\nchild of two\n"

    def test_logs_are_appended_to_and_keep_what_was_said_before_a_kill(self, make, tmp_path):
        platform = make()
        log = tmp_path / "log"
        call(platform, "say", text="one", log_path=log).result()
        call(platform, "say", text="silent").result()
        result = call(platform, "fail", message="that was all", log_path=log).result()
        assert result.ending == "crashed"
        lines = log.read_text().splitlines()
        assert lines[0] == "one"
        assert lines[-1] == "ValueError: that was all"
        assert "silent" not in lines


class TimeLimitContract:
    """The time limit is enforced."""

    def test_the_time_limit_ends_a_function_and_caps_its_bill(self, make):
        platform = make()
        result = call(platform, "wait", timeout_s=0.3).result()
        assert result.ending == "timed_out"
        assert result.detail == "ran longer than its time limit of 0.3 s"
        assert result.billed_s == 0.3
        assert platform.bill().gb_s == pytest.approx(0.3 / 4)
        assert call(platform, "nothing").result().cold


class MemoryContract:
    """The memory limit is enforced."""

    def test_exceeding_the_memory_is_told_with_the_peak(self, make):
        platform = make()
        result = call(platform, "grow", mb=600, memory_mb=128).result()
        assert result.ending == "out_of_memory"
        assert 120 <= result.peak_mb <= 250
        assert "its limit is 128 MB" in result.detail
        assert call(platform, "nothing", memory_mb=128).result().cold

    def test_memory_below_the_limit_is_fine_and_told(self, make):
        result = call(make(), "grow", mb=80, memory_mb=256).result()
        assert result.ending == "returned"
        assert 80 <= result.peak_mb <= 200

    def test_child_processes_count(self, make):
        result = call(make(), "grow_below", mb=600, memory_mb=128).result()
        assert result.ending == "out_of_memory"


class CpuShareContract:
    """Memory gives the CPU share."""

    #: Memory of two functions, MB; the second has twice the share.
    SIZES = (177, 354)

    def test_twice_the_memory_is_twice_the_cpu_time(self, make):
        platform = make()

        def ratio():
            calls = [call(platform, "burn", seconds=1.5, memory_mb=mb) for mb in self.SIZES]
            small, large = (each.result().cpu_s for each in calls)
            return large / small

        # A machine that is busy with something else may not give the larger one its share.
        assert any(1.5 < ratio() < 2.6 for _ in range(5))

    def test_no_more_than_the_share(self, make):
        platform = make()
        result = call(platform, "burn", seconds=1.5, memory_mb=self.SIZES[0]).result()
        assert result.cpu_s <= 1.3 * platform.cores(self.SIZES[0]) * result.billed_s


class CancelContract:
    """Invocations can be cancelled."""

    def test_cancel_ends_it_at_once(self, make, tmp_path):
        platform = make()
        assert isinstance(platform, Cancels)
        other = call(platform, "wait_for", path=str(tmp_path / "gate"))
        victim = call(platform, "wait")
        platform.cancel(victim.invocation.invocation_id)
        platform.cancel(victim.invocation.invocation_id)
        assert victim.result().ending == "cancelled"
        (tmp_path / "gate").touch()
        assert other.result().ending == "returned"

    def test_cancelling_what_is_not_running_is_ignored(self, make):
        platform = make()
        platform.cancel("never heard of")
        done = call(platform, "nothing")
        assert done.result().ending == "returned"
        platform.cancel(done.invocation.invocation_id)
        assert call(platform, "nothing").result().ending == "returned"


class DuplicateContract:
    """Everything may be delivered twice: ``make(duplicates=True)``."""

    def test_both_deliveries_run_and_are_billed_and_one_result_is_told(self, make, tmp_path):
        platform = make(duplicates=True)
        assert platform.limits.deliveries == 2
        path = tmp_path / "ids"
        result = call(platform, "write_ids", path=str(path)).result()
        assert result.deliveries == 2
        assert len(path.read_text().splitlines()) == 2
        bill = platform.bill()
        assert bill.requests == 2
        assert bill.gb_s == pytest.approx(result.billed_s / 4)

    def test_one_that_returns_is_enough(self, make, tmp_path):
        result = call(make(duplicates=True), "first_returns", path=str(tmp_path / "x")).result()
        assert result.ending == "returned"
        assert result.deliveries == 2

    def test_without_room_the_second_is_dropped(self, make):
        platform = make(duplicates=True, concurrency=1)
        assert call(platform, "nothing").result().deliveries == 1
        assert platform.bill().requests == 1

    def test_cancel_ends_both(self, make):
        platform = make(duplicates=True)
        victim = call(platform, "wait")
        platform.cancel(victim.invocation.invocation_id)
        result = victim.result()
        assert (result.ending, result.deliveries) == ("cancelled", 2)
