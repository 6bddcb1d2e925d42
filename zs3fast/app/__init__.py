"""The web page: an image, words, and which pixels are which, in a browser; `zs3fast app`."""
