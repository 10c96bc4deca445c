"""Standard tests of language models: HellaSwag, LAMBADA, WikiText, defined as in lm-evaluation-harness."""
