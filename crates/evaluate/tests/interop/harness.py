"""The figures of lm-evaluation-harness for a model on local documents.

    harness.py DIR DATA

`DATA` is JSON: `documents`, texts; `choices`, items with a context, choices and the index of the right one;
`problems` and `shots`, with a question and an answer; `max_new_tokens`. Prints JSON: the metrics of the tasks
and what they were made of, one request after the other. Needs lm_eval 0.4.13 with its `hf` extra.
"""

import json
import logging
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import lm_eval
import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

TASKS = Path(lm_eval.__file__).parent / "tasks"


class Loader(yaml.SafeLoader):
    """Of tasks with functions in Python, which are replaced here."""


Loader.add_constructor("!function", lambda loader, node: None)


def task(name, published, rows, shots, **changes):
    """A published task on other documents, of which `shots` are those of the prompts."""
    config = yaml.load((TASKS / published).read_text(), Loader)
    splits = {"test": datasets.Dataset.from_list(rows)}
    if shots:
        splits["train"] = datasets.Dataset.from_list(shots)
    config |= dict(
        task=name,
        custom_dataset=lambda **_: splits,
        training_split="train" if shots else None,
        fewshot_split="train" if shots else None,
        validation_split=None,
        test_split="test",
        num_fewshot=len(shots),
        should_decontaminate=False,
    )
    for key in ("dataset_path", "dataset_name", "tag"):
        config.pop(key, None)
    config |= changes
    return ConfigurableTask(config={key: value for key, value in config.items() if value is not None})


def process_document(document, results):
    # As `preprocess_wikitext.py`, without changes to the text.
    import re

    (loglikelihood,) = results
    words = len(re.split(r"\s+", document["page"]))
    n_bytes = len(document["page"].encode("utf-8"))
    return {
        "word_perplexity": (loglikelihood, words),
        "byte_perplexity": (loglikelihood, n_bytes),
        "bits_per_byte": (loglikelihood, n_bytes),
    }


def evaluate(model, made):
    found = lm_eval.simple_evaluate(model=model, tasks=[made], bootstrap_iters=0, log_samples=True)
    name = made.config.task
    metrics = {key: value for key, value in found["results"][name].items() if isinstance(value, float)}
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return metrics, samples


def documents(model, data):
    made = task(
        "documents",
        "wikitext/wikitext.yaml",
        [{"page": text} for text in data["documents"]],
        [],
        doc_to_target="{{page}}",
        process_results=process_document,
    )
    metrics, samples = evaluate(model, made)
    sums = {sample["doc_id"]: sample["resps"][0][0] for sample in samples}
    return {"metrics": metrics, "log_likelihoods": [sums[at] for at in sorted(sums)]}


def choices(model, data):
    made = task(
        "choices",
        "arc/arc_easy.yaml",
        data["choices"],
        [],
        doc_to_text="{{context}}",
        doc_to_target="{{answer}}",
        doc_to_choice="{{choices}}",
    )
    metrics, samples = evaluate(model, made)
    sums = {sample["doc_id"]: [resp[0][0] for resp in sample["resps"]] for sample in samples}
    return {"metrics": metrics, "log_likelihoods": [sums[at] for at in sorted(sums)]}


def problems(model, data):
    made = task(
        "problems",
        "gsm8k/gsm8k.yaml",
        data["problems"],
        data["shots"],
        fewshot_config={"sampler": "first_n"},
        generation_kwargs={
            "until": ["Question:", "</s>", "<|im_end|>"],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": data["max_new_tokens"],
        },
    )
    metrics, samples = evaluate(model, made)
    texts = {sample["doc_id"]: sample["resps"][0][0] for sample in samples}
    return {"metrics": metrics, "texts": [texts[at] for at in sorted(texts)]}


def main():
    logging.disable(logging.WARNING)
    directory, data = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())

    def model(**settings):
        return HFLM(pretrained=directory, device="cpu", dtype="float32", batch_size=1, **settings)

    plain = model()
    found = {
        "documents": documents(plain, data),
        "add_bos_token": documents(model(add_bos_token=True), data),
        "no_bos_token": documents(model(add_bos_token=False), data),
        "choices": choices(plain, data),
    }
    if data["problems"]:
        found["problems"] = problems(plain, data)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
