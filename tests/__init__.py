"""Tests of concept_erasure."""
