"""Images for a vision-language model: the tokens that they expand to, and the tensors that go beside them.

Rows hold token ids in which every image has its tokens already, so masks, truncation and references know nothing of
images; a collator adds pixels. Both are asked of the model's own processor, by its public call alone.
"""
