"""What articles on saving language models teach still works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import asyncsave

VOCABULARY = 20


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.rnn = nn.RNN(16, 32, batch_first=True)
        self.linear = nn.Linear(32, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.rnn(self.embedding(tokens))
        logits: torch.Tensor = self.linear(hidden)
        return logits


def train(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, steps: range) -> Any:
    losses = []
    for step in steps:
        tokens = torch.randint(0, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(step))
        logits = model(tokens[:, :-1])
        loss = criterion(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_save_load_and_go_on(tmp_path: Path) -> None:
    model = LanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    train(model, optimizer, criterion, range(10))
    handle = asyncsave.save(
        {
            "epoch": 10,
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "loss": criterion,
        },
        tmp_path / "model",
    )
    expected = train(model, optimizer, criterion, range(10, 20))
    handle.result()

    checkpoint = asyncsave.load(tmp_path / "model")
    model = LanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.load_state_dict(checkpoint["model_state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    assert checkpoint["epoch"] == 10
    assert checkpoint["loss"] == {}, "a criterion without state is saved as what state_dict() says"
    assert train(model, optimizer, nn.CrossEntropyLoss(), range(10, 20)) == expected
    model.eval()


class Classifier(LanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(32, 2)


def test_fine_tuning_takes_only_the_models_part(tmp_path: Path) -> None:
    model = LanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, nn.CrossEntropyLoss(), range(3))
    state = {"epoch": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    asyncsave.save(state, tmp_path / "pretrained").result()

    larger = Classifier()
    untouched = larger.classifier.weight.detach().clone()
    part = asyncsave.load(tmp_path / "pretrained", keys="model.*")
    assert list(part) == ["model"]
    result = larger.load_state_dict(part["model"], strict=False)
    assert result.missing_keys == ["classifier.weight", "classifier.bias"]
    assert result.unexpected_keys == []
    assert torch.equal(larger.rnn.weight_hh_l0, model.rnn.weight_hh_l0)
    assert torch.equal(larger.classifier.weight, untouched)

    again = Classifier()
    asyncsave.restore(tmp_path / "pretrained", {"model": again}, strict=False)
    assert torch.equal(again.embedding.weight, model.embedding.weight)
