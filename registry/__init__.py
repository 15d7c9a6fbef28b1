"""Specs, discovery, selection, explain and build: how patterns and backends find each other."""
