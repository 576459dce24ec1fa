"""The models that the pipeline makes, by name: where each one's bundle is published."""

BUNDLES = {
    "teacher": "artifacts/teacher",
    "progressive": "artifacts/students/progressive",
    "consistency": "artifacts/students/consistency",
}
