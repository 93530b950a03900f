"""Adapters to evaluation harnesses: lmms-eval (`lmms`) and VLMEvalKit (`vlmeval`), based on `answering`.

Each is imported by its harness, which must be installed; relook depends on neither.
"""
