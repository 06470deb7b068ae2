"""The controller of ENAS (Pham et al., 2018): an LSTM that makes one decision after the other.

It learns by REINFORCE with a moving average of the rewards as baseline and a bonus for entropy.
Rewards may come late and in any order: the probability of an architecture is computed anew, with
the present parameters, when its reward arrives.

| symbol | meaning |
|---|---|
| a | the decisions of one architecture |
| pi(a) | their probability, by the present parameters |
| R(a) | its reward |
| b | baseline: a moving average of the rewards |
| H | mean entropy of the decisions, in nats |

loss = -(R(a) - b) ln pi(a) - entropy_weight H
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from smlt_tune.integrations.nni.enas.choices import Choice

#: Logits stay within +- this, so that no option ever becomes impossible (ENAS, appendix A).
TANH_CONSTANT = 2.5
#: Parameters begin within +- this, as in ENAS: all options are almost equally likely.
INITIAL = 0.1

#: Gives the number of the option to take, from the logarithms of their probabilities.
Decide = Callable[[torch.Tensor], int]


class Controller:
    """Samples architectures, and learns which are good.

    Args:
        choices: What there is to choose.
        hidden: Size of the LSTM.
        learning_rate: Of Adam.
        entropy_weight: Reward for a nat of entropy: how long it keeps exploring.
        baseline_decay: Of the moving average, per reward.
        seed: Of its parameters and samples.

    Attributes:
        rewards: From how many it has learnt.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        *,
        hidden: int = 64,
        learning_rate: float = 5e-3,
        entropy_weight: float = 1e-3,
        baseline_decay: float = 0.9,
        seed: int = 0,
    ) -> None:
        self._choices = list(choices)
        self._entropy_weight = entropy_weight
        self._baseline_decay = baseline_decay
        self._baseline: float | None = None
        self.rewards = 0
        self._random = torch.Generator().manual_seed(seed)
        options = [number for choice in self._choices for number in choice.options]
        self._network = _Network(options, hidden, self._random)
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=learning_rate)

    @torch.no_grad()
    def sample(self) -> dict[str, Any]:
        """An architecture: what is chosen, by label."""

        def draw(logs: torch.Tensor) -> int:
            return int(torch.multinomial(logs.exp(), 1, generator=self._random))

        return self._walk(lambda choice: [draw] * len(choice.options))[0]

    def learn(self, sample: Mapping[str, Any], reward: float) -> None:
        """One step of REINFORCE.

        Args:
            sample: The architecture; labels that are not among the choices are ignored.
            reward: How good it is; more is better.
        """
        logs, entropies = self._evaluate(sample)
        self._baseline = reward if self._baseline is None else self._baseline
        advantage = reward - self._baseline
        self._baseline += (1 - self._baseline_decay) * advantage
        loss = -advantage * torch.stack(logs).sum()
        loss -= self._entropy_weight * torch.stack(entropies).mean()
        self.rewards += 1
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    @torch.no_grad()
    def log_probabilities(self, sample: Mapping[str, Any]) -> list[float]:
        """Logarithm of the probability of each decision of an architecture."""
        return [float(log) for log in self._evaluate(sample)[0]]

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that sampling and learning depend on."""
        state = {
            "network": self._network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "baseline": self._baseline,
            "rewards": self.rewards,
            "random": self._random.get_state(),
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what :meth:`state_dict` gave."""
        self._network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._baseline = state["baseline"]
        self.rewards = state["rewards"]
        self._random.set_state(state["random"])

    def _evaluate(self, sample: Mapping[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        def repeat(choice: Choice) -> list[Decide]:
            return [lambda _, i=i: i for i in choice.decisions(sample[choice.label])]  # type: ignore[misc]

        _, logs, entropies = self._walk(repeat)
        return logs, entropies

    def _walk(
        self, deciders: Callable[[Choice], Sequence[Decide]]
    ) -> tuple[dict[str, Any], list[torch.Tensor], list[torch.Tensor]]:
        """Makes all decisions; returns the sample, ln pi and the entropy of each decision."""
        sample, logs, entropies = {}, [], []
        walk = self._network.walk()
        for choice in self._choices:
            decided: list[int] = []
            for decide in deciders(choice):
                scores = next(walk) + torch.tensor(choice.prior(decided))
                options = torch.log_softmax(scores, 0)
                taken = decide(options)
                decided.append(taken)
                logs.append(options[taken])
                entropies.append(_entropy(options))
                walk.took(taken)
            sample[choice.label] = choice.value(decided)
        return sample, logs, entropies


class _Network(nn.Module):
    """An LSTM with one head and one set of embeddings for every decision."""

    def __init__(self, options: Sequence[int], hidden: int, random: torch.Generator) -> None:
        super().__init__()
        self.hidden = hidden
        self.start = nn.Parameter(torch.empty(hidden))
        self.cell = nn.LSTMCell(hidden, hidden)
        self.embeddings = nn.ModuleList(nn.Embedding(number, hidden) for number in options)
        self.heads = nn.ModuleList(nn.Linear(hidden, number) for number in options)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -INITIAL, INITIAL, generator=random)

    def walk(self) -> "_Walk":
        return _Walk(self)


class _Walk:
    """One pass through the network: scores of a decision, then what was taken, in turn."""

    def __init__(self, network: _Network) -> None:
        self._network = network
        self._number = 0
        self._input = network.start
        zeros = torch.zeros(network.hidden)
        self._state = zeros, zeros

    def __next__(self) -> torch.Tensor:
        self._state = self._network.cell(self._input, self._state)
        scores: torch.Tensor = self._network.heads[self._number](self._state[0])
        return TANH_CONSTANT * torch.tanh(scores)

    def took(self, option: int) -> None:
        embedding = self._network.embeddings[self._number]
        self._input = embedding(torch.tensor(option))
        self._number += 1


def _entropy(logs: torch.Tensor) -> torch.Tensor:
    """Of a distribution, in nats. The clamp keeps gradients finite where the probability is 0."""
    return -(logs.exp() * logs.clamp_min(-100.0)).sum()
