"""A vLLM server as the student's writer: it writes, Katana decides (docs/vllm.md).

Nothing of vLLM is imported: the server has an environment of its own, and is spoken to over HTTP (`client`). What it
answers becomes chunks in `chunks`, `writer` fills the interface that the slots fill, `weights` swaps the server's
weights, `server` runs one that belongs to a worker.
"""
