"""At the line: an exported detector at work on pictures. Nothing here needs torch, Ray or Ultralytics."""
