import json
import math
import re
from decimal import Decimal
from fractions import Fraction
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlt_tune.backend.prices import Prices, load_prices, nanos_to_usd, usd_to_nanos
from smlt_tune.errors import InvalidInput

AWS = load_prices()
NAME = "aws-us-east-1-2026-01"
FINITE = "must be a finite number of at least 0, not"
NUMBER = "must be a number of at least 0, not"


def document():
    return json.loads((files("smlt_tune.backend") / "price_data" / f"{NAME}.json").read_text())


def saved(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_list_that_comes_with_the_package_is_dated_and_says_its_sources():
    assert (AWS.name, AWS.as_of, AWS.currency, AWS.region) == (NAME, "2026-01", "USD", "us-east-1")
    assert all("aws.amazon.com" in source or "own" in source for source in AWS.sources)


@pytest.mark.parametrize(
    ("memory_mb", "billed_s", "deliveries", "usd"),
    [
        (1769, 3600, 1, "0.103652752"),  # one vCPU-hour, $0.1037/h
        (1024, 1, 1, "0.000016867"),  # 16,666.7 + 200 nano-dollars, rounded up
        (1024, 0, 1, "0.0000002"),
        (1024, 0, 3, "0.0000006"),
        (1024, 0.0001, 1, "0.000000217"),  # billed as a whole millisecond
        (1024, 0.1 + 0.2, 1, "0.000005201"),  # 300 ms, not 301
        (10240, 900, 1, "0.1500005"),
        (1769, 0, 0, "0"),
    ],
)
def test_an_invocation_costs_memory_time_and_starts(memory_mb, billed_s, deliveries, usd):
    assert AWS.invocation_usd(memory_mb, billed_s, deliveries) == float(usd)


def test_arm_is_cheaper():
    arm = load_prices(architecture="arm64")
    assert arm.invocation_usd(1024, 1000) == 0.0133336
    assert arm.architecture == "arm64"


def test_object_requests_are_priced_by_the_thousand():
    assert AWS.object_requests_usd(1000, 0) == 0.005
    assert AWS.object_requests_usd(0, 1000) == 0.0004
    assert AWS.object_requests_usd(1, 1) == 0.0000054


@pytest.mark.parametrize(
    ("row", "hours", "usd"),
    [
        ("cache.m4.large", 0, 0.0),
        ("cache.m4.large", 0.01, 0.156),
        ("cache.m4.large", 1, 0.156),
        ("cache.m4.large", 1.5, 0.312),
        ("cache.r5.4xlarge", 2, 3.448),
        ("own", 1000, 0.0),
    ],
)
def test_a_parameter_store_is_billed_in_whole_hours(row, hours, usd):
    assert AWS.parameter_store_usd(row, hours) == usd


def test_the_worst_case_has_every_delivery_initialise_and_run_out_of_time():
    assert AWS.worst_case_usd(1024, 900) == AWS.invocation_usd(1024, 910)
    assert AWS.worst_case_usd(1024, 900, 3) == AWS.invocation_usd(1024, 2730, 3)
    both = AWS.worst_case_usd(1024, 900, object_puts=1000, object_gets=1000)
    assert usd_to_nanos(both) == usd_to_nanos(AWS.invocation_usd(1024, 910)) + 5_400_000


memories = st.integers(128, 10240)
times = st.floats(0, 900)


@given(memories, times, st.integers(1, 3), st.integers(0, 99), st.integers(0, 99), st.data())
def test_no_settlement_exceeds_its_worst_case(memory_mb, timeout_s, starts, puts, gets, data):
    billed_s = sum(
        math.ceil(data.draw(st.floats(0, timeout_s)) * 1000) / 1000 for _ in range(starts)
    )
    cost = AWS.invocation_usd(memory_mb, billed_s, starts) + AWS.object_requests_usd(puts, gets)
    worst = AWS.worst_case_usd(memory_mb, timeout_s, starts, puts, gets)
    assert usd_to_nanos(cost) <= usd_to_nanos(worst)


@given(memories, st.integers(0, 900_000), st.integers(1, 3))
def test_a_cost_is_the_exact_one_rounded_up_to_a_nano_dollar(memory_mb, billed_ms, deliveries):
    exact = Fraction(memory_mb, 1024) * Fraction(billed_ms, 1000) * Fraction("0.0000166667")
    exact += deliveries * Fraction("0.0000002")
    usd = AWS.invocation_usd(memory_mb, billed_ms / 1000, deliveries)
    assert usd_to_nanos(usd) == math.ceil(exact * 10**9)


@given(st.integers(0, 10**15))
def test_nano_dollars_survive_being_a_float(nanos):
    assert usd_to_nanos(nanos_to_usd(nanos)) == nanos


@given(st.lists(st.integers(0, 10**12), max_size=20))
def test_adding_floats_costs_no_nano_dollar(amounts):
    if sum(amounts) > 10**12:
        return
    assert usd_to_nanos(sum(nanos_to_usd(n) for n in amounts)) == sum(amounts)


@pytest.mark.parametrize(
    ("usd", "nanos"),
    [(0, 0), (1, 10**9), (1e-10, 1), (1e-9, 1), (1.5e-9, 2), (0.1 + 0.2, 3 * 10**8)],
)
def test_amounts_are_rounded_up(usd, nanos):
    assert usd_to_nanos(usd) == nanos


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.invocation_usd(-1, 1), f"memory_mb {FINITE} -1.0"),
        (lambda p: p.invocation_usd(1, -1), f"billed_s {FINITE} -1.0"),
        (lambda p: p.invocation_usd(1, math.nan), f"billed_s {FINITE} nan"),
        (lambda p: p.worst_case_usd(1, math.inf), f"timeout_s {FINITE} inf"),
        (lambda p: p.object_requests_usd(-1, 0), f"object puts {FINITE} -1.0"),
        (lambda p: p.parameter_store_usd("own", -1), f"hours {FINITE} -1.0"),
        (
            lambda p: p.parameter_store_usd("redis", 1),
            f"no price for the parameter store 'redis' in {NAME}: "
            "cache.m4.large, cache.r5.4xlarge, own",
        ),
    ],
)  # fmt: skip
def test_impossible_quantities_are_refused(call, message):
    with pytest.raises(InvalidInput, match=f"^{re.escape(message)}$"):
        call(AWS)


def changed(path, value):
    """The list with one value replaced, or removed where the value is ``...``."""
    result = document()
    section = result
    *folders, key = path
    for folder in folders:
        section = section[folder]
    if value is ...:
        del section[key]
    else:
        section[key] = value
    return result


@pytest.mark.parametrize(
    ("path", "value", "mistake"),
    [
        (["as_of"], "January", "as_of must be a date such as 2026-01, not 'January'"),
        (["currency"], "EUR", "currency must be USD, not 'EUR'"),
        (["region"], ..., "region is missing"),
        (["sources"], [], "sources must be a list of texts, not []"),
        (["colour"], 1, "colour is not known"),
        (["function"], {}, "function must be an object with entries, not {}"),
        (["function", "request"], -1, f"function.request {NUMBER} -1"),
        (["function", "request"], True, f"function.request {NUMBER} True"),
        (["function", "request"], math.nan, f"function.request {NUMBER} NaN"),
        (["function", "request"], 1e99, f"function.request {NUMBER} 1E+99"),
        (
            ["function", "billing_step_s"],
            0,
            "function.billing_step_s must be a number above 0, not 0",
        ),
        (["function", "gb_second"], {"riscv": 1}, "no price for the architecture 'x86_64': riscv"),
        (["function", "gb_second", "arm64"], "1", f"function.gb_second.arm64 {NUMBER} '1'"),
        (["function", "gigabytes"], 1, "function.gigabytes is not known"),
        (["object_store", "get_per_1000"], ..., "object_store.get_per_1000 is missing"),
        (["object_store", "get"], 1, "object_store.get is not known"),
        (["parameter_store"], ..., "parameter_store is missing"),
        (["parameter_store", "own", "hour"], "", f"parameter_store.own.hour {NUMBER} ''"),
        (["parameter_store", "own", "day"], 1, "parameter_store.own.day is not known"),
        (["parameter_store", "x"], 1, "parameter_store.x must be an object with entries, not 1"),
    ],
)  # fmt: skip
def test_a_bad_list_is_refused(tmp_path, path, value, mistake):
    with pytest.raises(InvalidInput) as error:
        load_prices(saved(tmp_path, changed(path, value)))
    assert error.value.mistakes == (f"price list mine: {mistake}",)


def test_all_mistakes_of_a_list_are_told_at_once(tmp_path):
    bad = changed(["as_of"], 3)
    del bad["region"]
    bad["function"]["request"] = "x"
    bad["object_store"]["puts"] = 1
    with pytest.raises(InvalidInput) as error:
        load_prices(saved(tmp_path, bad), architecture="sparc")
    assert len(error.value.mistakes) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "price list mine: is not JSON: "),
        ("[1]", "price list mine: must be an object"),
        ("{}", "price list mine: schema is None; this version reads 1"),
        ('{"schema": 2}', "price list mine: schema is 2; this version reads 1"),
        ('{"schema": 1, "region": "a", "region": "b"}', "price list mine: region is given twice"),
    ],
)
def test_a_file_that_is_no_price_list_is_refused(tmp_path, content, message):
    with pytest.raises(InvalidInput, match=f"^{re.escape(message)}"):
        load_prices(saved(tmp_path, content))


def test_a_list_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=f"^no price list is called 'gcp'; there is {NAME}$"):
        load_prices("gcp")
    with pytest.raises(InvalidInput, match=r"^cannot read the price list .*none\.json"):
        load_prices(str(tmp_path / "none.json"))


def test_a_list_of_ones_own_is_read(tmp_path):
    mine = load_prices(saved(tmp_path, changed(["function", "init_limit_s"], 0)))
    assert isinstance(mine, Prices)
    assert mine.name == "mine"
    assert mine.init_limit_s == Decimal(0)
    assert mine.worst_case_usd(1024, 1) == AWS.invocation_usd(1024, 1)
    assert hash(mine) != hash(AWS)
