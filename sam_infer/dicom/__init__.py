"""DICOM without a network: series as volumes, label maps as DICOM SEG and back."""
