"""Paged caches of servers that hand out slots for single tokens, as codes: what the vLLM plugin and `batching` share.

`blocks`: how a server's blocks hold records of tokens, and how a history in blocks is read. `rows`: a step's requests.
`attention`: one layer's attention over them. `codecs`: which specs such caches can have.
"""
