"""What the writers write."""

from angeljax.train.metrics import Console, TensorBoard, peak_flops


def test_plain_lines_where_there_is_no_terminal(capsys):
    console = Console(steps=20)
    numbers = {"loss": 2.0, "tokens": 3e6, "tokens_per_second": 12345.0, "mfu": 0.456}
    console.write(10, {**numbers, "seconds_left": 3723.0})
    console.close()
    assert capsys.readouterr().err == (
        "step 10/20  loss 2  3M tokens  12,345 tokens/s  mfu 45.6%  1:02:03 left\n"
    )
    Console(steps=20, show=False).write(10, numbers)
    assert capsys.readouterr().err == ""


def test_live_line_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(steps=20)
    console.write(10, {"loss": 2.5})
    console.write(10, {"eval/perplexity": 7.0})
    console.close()
    shown = capsys.readouterr().err
    assert "10/20" in shown and "loss 2.5" in shown
    assert "step 10  eval/perplexity 7\n" in shown


def test_tensorboard(tmp_path):
    """Event files hold the numbers; they are read back as records of protobuf."""
    writer = TensorBoard(tmp_path)
    writer.write(7, {"loss": 2.5})
    writer.close()
    (file,) = tmp_path.iterdir()
    from tensorboardX.proto.event_pb2 import Event

    data, events = file.read_bytes(), []
    while data:  # length, its checksum, record, its checksum
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    found = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert found == [(7, "loss", 2.5)]


def test_peak():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("cpu") is None
