"""Others' harnesses ask a model of relook: a class for lmms-eval (`lmms`), and one for VLMEvalKit (`vlmeval`).

Each is imported by its harness, which has to be installed; relook does not depend on either. What they share is
`answering`.
"""
