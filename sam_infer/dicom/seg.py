"""Label maps as DICOM SEG and back: what other rooms use."""

from sam_infer.dicom.segreader import read_seg, referenced_series
from sam_infer.dicom.segwriter import write_seg

__all__ = ["read_seg", "referenced_series", "write_seg"]
