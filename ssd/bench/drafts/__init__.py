"""Comparing drafts, trees and forecasts."""
