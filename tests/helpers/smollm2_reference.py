"""Write tests/experiments/smollm2_reference.json, with two other implementations.

Tokens come from llama.cpp, by the package node-llama-cpp of npm. Logits come from
transformers, on a CPU and in float32. The tokenizer that transformers makes from the
file is not used, because it does not split digits from spaces.

The file was made with node-llama-cpp 3.22.1, and with transformers 5.24.0, torch 2.13.0
and gguf 0.19.0 on Python 3.11:

    npm install --ignore-scripts node-llama-cpp
    pip install torch transformers gguf
    HF_HUB_OFFLINE=1 python -P CLONE/tests/helpers/smollm2_reference.py DATA_DIR/smollm2
"""

import json
import pathlib
import subprocess
import sys
import tempfile

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET = pathlib.Path(__file__).parents[1] / "experiments" / "smollm2_reference.json"

# Prose, code with indented digits, a conversation, and much that is not English.
TEXTS = [
    "The old lighthouse keeper climbed the stairs every evening, lit the lamp, and "
    "wrote the weather into his book. In forty years he had never missed a night, but",
    "def total(prices, rate=0.19):\n    # 3 rounds\n    for i in range(12):\n"
    "        1 + x[i]\n\treturn sum(prices) * (1 + rate)  # 2026-11-29\n",
    "<|im_start|>user\nWhat's 7 times 8?<|im_end|>\n<|im_start|>assistant\n",
    "  two spaces, été naïve Straße, ½ of ٣ and ² — don't I'LL   'tis"
    "\r\n\r\n日本語 🎉👩‍🚀 e\u0301 ",
    "  1   22    333\n 4\t 5\n\n\n   six  7",
]

SCRIPT = """
import {getLlama} from "node-llama-cpp";
const llama = await getLlama({gpu: false, build: "never", skipDownload: true});
const model = await llama.loadModel({modelPath: process.argv[2], vocabOnly: true});
const texts = JSON.parse(process.argv[3]);
console.log(JSON.stringify(texts.map((text) => model.tokenize(text, true))));
process.exit(0);
"""


def tokens(folder: pathlib.Path) -> list[list[int]]:
    # Node looks for packages beside the script.
    with tempfile.NamedTemporaryFile("w", suffix=".mjs", dir=".") as script:
        script.write(SCRIPT)
        script.flush()
        words = ["node", script.name, str(folder / FILE), json.dumps(TEXTS)]
        result = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def logits(folder: pathlib.Path, rows: list[list[int]]) -> list[dict[str, list]]:
    """Return the five largest logits, and the log-sum-exp, after every token."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32
    )
    results = []
    for row in rows:
        with torch.no_grad():
            output = model(torch.tensor([row])).logits[0]
        top = output.topk(5)
        total = output.double().logsumexp(-1)
        results.append(
            {
                "indices": top.indices.tolist(),
                "values": [[round(x, 5) for x in five] for five in top.values.tolist()],
                "log_sum_exp": [round(x, 5) for x in total.tolist()],
            }
        )
    return results


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    rows = tokens(folder)
    examples = [
        {"text": text, "tokens": row, **result}
        for text, row, result in zip(TEXTS, rows, logits(folder, rows), strict=True)
    ]
    lines = ",\n".join(json.dumps(example) for example in examples)
    TARGET.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
