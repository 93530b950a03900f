"""Models behind OpenAI-compatible endpoints: the model calls a region, the crop is made here and sent back.

openai.py    the engine (`perceive.engine.Engine`)
asking.py    one request: its conversation as messages, and the looks in between
dialects.py  how models behind endpoints spell a look, a row each
remote.py    `VLM`'s interface over the engine
"""
