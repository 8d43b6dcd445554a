"""What an exported model needs beside its weights to recommend without this package: every item's tokens, and the prompt's."""

import json
from pathlib import Path

from sftrec_jax.run.session import Session

ITEMS_FILE = "items.jsonl"
PROMPT_FILE = "prompt.json"


def write_catalogue(session: Session, folder: Path) -> None:
    """Writes `items.jsonl`, a line an item in the order of the run: `item_id`, `title`, `history` (token ids as a prompt writes
    it, separator included), `answer` (token ids that name it); and `prompt.json`: `before` and `after` (token ids around the
    history), `max_history` (items) and `context` (tokens, answer included).
    """
    prompts, data, codes = session.prompts, session.dataset, session.codes
    answers = codes.codes.tolist()
    with (folder / ITEMS_FILE).open("w", encoding="utf-8") as file:
        for item, answer in enumerate(answers):
            row = {
                "item_id": str(data.item_ids[item]),
                "title": str(codes.titles[item]),
                "history": prompts.written(item).tolist(),
                "answer": [token for token in answer if token >= 0],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    prompt = {
        "before": prompts.beginning.tolist(),
        "after": prompts.suffix.tolist(),
        "max_history": prompts.max_history,
        "context": prompts.context,
    }
    (folder / PROMPT_FILE).write_text(json.dumps(prompt) + "\n", encoding="utf-8")
