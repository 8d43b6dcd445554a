"""Recommends with an exported model by transformers alone: beam search in which only items of the catalogue can be written.

    pip install torch transformers
    python recommend_with_transformers.py runs/quick/export --history 1 32 50     # item ids, oldest first

Same items as `sftrec recommend` in the same order, scores equal but for rounding: the export stands by itself. It is
some fifty times slower than `sftrec recommend` (benchmarks/decode_speed.py).
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList


class OnlyItems(LogitsProcessor):
    """Scores of tokens that continue no item become -inf; after an item comes END, at no cost."""

    def __init__(self, answers: list[list[int]], start: int, end: int):
        self.start, self.end = start, end
        self.following: dict[tuple[int, ...], set[int]] = {}
        for answer in answers:
            for at, token in enumerate(answer):
                self.following.setdefault(tuple(answer[:at]), set()).add(token)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, -torch.inf)
        for row, written in enumerate(input_ids[:, self.start :].tolist()):
            tokens = self.following.get(tuple(written))
            if tokens:
                allowed = torch.tensor(sorted(tokens))
                masked[row, allowed] = scores[row, allowed]
            else:
                masked[row, self.end] = 0.0
        return masked


def recommend(export: Path, history: list[str], k: int, beam: int) -> list[tuple[str, str, float]]:
    """The k best unseen items after a history: (item id, title, log-probability of its tokens)."""
    items = [json.loads(line) for line in (export / "items.jsonl").open(encoding="utf-8")]
    prompt = json.loads((export / "prompt.json").read_text(encoding="utf-8"))
    by_id = {item["item_id"]: item for item in items}
    longest = max(len(item["answer"]) for item in items)

    # The newest items that fit, each written whole.
    room = prompt["context"] - longest - len(prompt["before"]) - len(prompt["after"])
    written: list[int] = []
    for item_id in list(reversed(history))[: prompt["max_history"]]:
        tokens = by_id[item_id]["history"]
        if len(written) + len(tokens) > room:
            break
        written = tokens + written
    tokens = torch.tensor([prompt["before"] + written + prompt["after"]])

    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    unseen: dict[tuple[int, ...], list[dict]] = {}  # semantic ids may be shared
    for item in items:
        if item["item_id"] not in history:
            unseen.setdefault(tuple(item["answer"]), []).append(item)
    # Any token that no item contains can stand for the end.
    used = {token for answer in unseen for token in answer}
    end = next(token for token in range(model.config.get_text_config().vocab_size) if token not in used)
    found = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        logits_processor=LogitsProcessorList([OnlyItems(list(map(list, unseen)), tokens.shape[1], end)]),
        num_beams=max(beam, k),
        num_return_sequences=k,
        max_new_tokens=longest + 1,
        eos_token_id=end,
        pad_token_id=end,
        length_penalty=0.0,  # the sum of log-probabilities, not their mean
        early_stopping="never",
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = found.sequences[:, tokens.shape[1] :].tolist()
    ranked = zip(rows, found.sequences_scores.tolist(), strict=True)
    named = [(item, score) for row, score in ranked for item in unseen[tuple(token for token in row if token != end)]]
    return [(item["item_id"], item["title"], score) for item, score in named[:k]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="folder `export/` of a run")
    parser.add_argument("--history", nargs="+", required=True, metavar="ITEM_ID", help="item ids, oldest first")
    parser.add_argument("--k", type=int, default=10, help="length of the list")
    parser.add_argument("--beam", type=int, default=20, help="beams, at least k")
    args = parser.parse_args()
    for item_id, title, score in recommend(args.export, args.history, args.k, args.beam):
        print(f"{score:9.4f}  {item_id}  {title}")


if __name__ == "__main__":
    main()
