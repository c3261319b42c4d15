"""Drawing keeps to its share of a core."""

from specdec_tui.display import SHARE, DrawThrottle


def test_screens_take_no_more_than_their_share():
    throttle, used, drawn = DrawThrottle(), 0.0, 0
    for tick in range(1, 1501):  # 100 s at 15 a second
        now = tick / 15
        if throttle.may_draw(now, used):
            throttle.drawing(now, used)
            used, drawn = used + 0.008, drawn + 1
    assert 0.8 * SHARE < used / 100 <= SHARE + 0.008 / 100
    assert drawn > 200
    assert abs(throttle.share - used / 100) < 0.2 * SHARE


def test_a_screen_that_takes_long_is_not_waited_for_longer_than_a_second():
    """The first one of a run lays out every panel."""
    throttle = DrawThrottle()
    throttle.drawing(0.0, 0.0)
    assert not throttle.may_draw(0.9, 0.2)
    assert throttle.may_draw(1.0, 0.2)


def test_a_screen_that_costs_nothing_is_drawn_every_time():
    throttle = DrawThrottle()
    for tick in range(1, 10):
        assert throttle.may_draw(tick / 15, 0.0)
        throttle.drawing(tick / 15, 0.0)
    assert throttle.share == 0


def test_the_share_is_unknown_before_the_second_screen():
    throttle = DrawThrottle()
    assert throttle.share is None
    throttle.drawing(1.0, 0.1)
    assert throttle.share is None
