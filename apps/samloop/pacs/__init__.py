"""Studies in a PACS: a DICOMweb client with deadlines, and the datastore over it."""
