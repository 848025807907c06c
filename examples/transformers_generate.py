"""Hand a composed context over to `generate` of transformers, for what BraidSDK can't do: here beam search."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from braidsdk import Braid
from braidsdk.models.registry import find_checkpoint

QUESTION = "What is the capital of Aistonia?"
BEAMS = 4

folder = find_checkpoint("braid-tiny")
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)

with Braid(folder, namespace="transformers", device="cpu") as braid:
    rules = braid.register_system("You answer questions from the documents.")
    texts = ["The capital of Aistonia is Flubarg.", "The capital of Thessily is Troick."]
    context = braid.compose([rules, *braid.register_many(texts, anchor=rules)], mode="anchored")
    print("braidsdk:", context.ask(QUESTION))

    # generate computes what the cache does not hold: the question. It writes into the cache, so each call gets its own.
    ids = torch.tensor([context.prompt_ids(QUESTION)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False}
    greedy = model.generate(**inputs, past_key_values=context.to_transformers_cache(model.config))
    print("transformers, greedy:", tokenizer.decode(greedy[0, ids.shape[1] :], skip_special_tokens=True))

    cache = context.to_transformers_cache(model.config)
    cache.batch_repeat_interleave(BEAMS)  # one row per beam
    beams = model.generate(**inputs, past_key_values=cache, num_beams=BEAMS)
    print("transformers, beam search:", tokenizer.decode(beams[0, ids.shape[1] :], skip_special_tokens=True))
