"""Subjects that every other room may use: one file per subject, nothing imported here."""
