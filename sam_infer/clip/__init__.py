"""CLIP models: where one looks for a text, made into prompts for a promptable engine."""
