"""First letters of words: the hierarchy of features that language models' SAEs are tested on."""
