"""The rooms behind `prepare`: sources, cleaning, duplicates, tokenizer, packing, the corpus."""
