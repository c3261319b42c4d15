"""Drawing keeps to its share of a core."""

from specdec_tui.display import SHARE, Thrift


def test_screens_take_no_more_than_their_share():
    thrift, used, drawn = Thrift(), 0.0, 0
    for tick in range(1, 1501):  # 100 s at 15 a second
        now = tick / 15
        if thrift.may_draw(now, used):
            thrift.drawing(now, used)
            used, drawn = used + 0.008, drawn + 1
    assert 0.8 * SHARE < used / 100 <= SHARE + 0.008 / 100
    assert drawn > 200
    assert abs(thrift.share - used / 100) < 0.2 * SHARE


def test_a_screen_that_takes_long_is_not_waited_for_longer_than_a_second():
    """The first one of a run lays out every panel."""
    thrift = Thrift()
    thrift.drawing(0.0, 0.0)
    assert not thrift.may_draw(0.9, 0.2)
    assert thrift.may_draw(1.0, 0.2)


def test_a_screen_that_costs_nothing_is_drawn_every_time():
    thrift = Thrift()
    for tick in range(1, 10):
        assert thrift.may_draw(tick / 15, 0.0)
        thrift.drawing(tick / 15, 0.0)
    assert thrift.share == 0


def test_the_share_is_unknown_before_the_second_screen():
    thrift = Thrift()
    assert thrift.share is None
    thrift.drawing(1.0, 0.1)
    assert thrift.share is None
