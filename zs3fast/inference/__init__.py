"""Images in, label maps out: the Segmenter, each method's test protocol, streaming and compiled forwards."""
