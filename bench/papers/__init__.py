"""Two papers' tables on small sets: pseudo labels by SAM from a U-Net's masks, and from an annotator."""
