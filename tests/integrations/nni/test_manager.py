"""What the driver and NNI's manager tell each other of one trial."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from smlt_tune.integrations.nni import manager
from smlt_tune.integrations.nni.metrics import Metric
from tests.clocks import FakeClock

PARAMETERS = [json.dumps({"parameter_id": 3, "parameters": {"x": 1}})]


@pytest.fixture
def nni_manager():
    """Answers for a trial with the next of ``trials``, and with ``stored`` for its metrics."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answers = server.trials if self.path == "/api/v1/nni/trial-jobs/T" else None
            answer = server.stored if answers is None else answers[0]
            if answers and len(answers) > 1:
                answers.pop(0)
            self.answer(answer)

        def do_PUT(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told = json.loads(content["metric"])
            server.told.append((told["type"], told["sequence"], told["value"]))
            self.answer({})

        def answer(self, content):
            content = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with HTTPServer(("localhost", 0), Handler) as server:
        server.stored, server.told = [], []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def trial(nni_manager):
    port = nni_manager.server_port
    return manager.ManagedTrial(port, "", "T", f"http://localhost:{port}/T", FakeClock())


@pytest.mark.parametrize(
    "unknown",
    [{}, {"status": "ADD_RESUMED", "hyperParameters": PARAMETERS}],
    ids=["new", "resumed"],
)
def test_a_trial_waits_until_the_manager_has_registered_it(nni_manager, unknown):
    known = {"status": "WAITING", "hyperParameters": PARAMETERS}
    nni_manager.trials = [unknown, unknown, known]
    assert trial(nni_manager).parameters() == {"x": 1}
    assert nni_manager.trials == [known]


def test_a_manager_that_never_registers_a_trial_is_given_up(nni_manager):
    nni_manager.trials = [{}]
    with pytest.raises(manager.ManagerGone, match="does not know the trial T"):
        trial(nni_manager).parameters()


def test_only_what_the_manager_lacks_is_told_again(nni_manager):
    nni_manager.trials = [{"status": "RUNNING", "hyperParameters": PARAMETERS}]
    nni_manager.stored = [
        {"type": "PERIODICAL", "sequence": 0},
        {"type": "PERIODICAL", "sequence": 2},
    ]
    resumed = trial(nni_manager)
    resumed.parameters()
    for value in (1.0, 2.0, 3.0, 4.0):
        resumed.report(Metric(final=False, value=value))
    resumed.report(Metric(final=True, value=4.0))
    expected = [("PERIODICAL", 1, "2.0"), ("PERIODICAL", 3, "4.0"), ("FINAL", 0, "4.0")]
    assert nni_manager.told == expected
