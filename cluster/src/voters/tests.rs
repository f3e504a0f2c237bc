//! Transcripts, then properties.

use proptest::prelude::*;

use super::*;

/// `1V 2V- 3l/a`: id, voter or learner, `w` witness, `-` silent, `x` dead, `+` behind, `/zone`.
fn seats(text: &str) -> Vec<Seat> {
    text.split_whitespace()
        .map(|word| {
            let (word, zone) = word.split_once('/').unwrap_or((word, ""));
            let digits = word.find(|c: char| !c.is_ascii_digit()).unwrap();
            let (id, flags) = word.split_at(digits);
            let health = match flags {
                _ if flags.contains('-') => Health::Silent,
                _ if flags.contains('x') => Health::Dead,
                _ if flags.contains('+') => Health::Behind,
                _ => Health::Ready,
            };
            Seat {
                id: id.parse().unwrap(),
                zone: zone.to_owned(),
                witness: flags.contains('w'),
                voter: flags.contains('V'),
                health,
            }
        })
        .collect()
}

/// The voters after each step, until nothing is to be done; 1 leads.
fn steps(text: &str) -> Vec<Vec<u64>> {
    let mut seats = seats(text);
    let mut steps = Vec::new();
    while let Some(next) = next_voters(1, &seats, VOTERS_MAX) {
        assert!(steps.len() < 20, "{steps:?}");
        steps.push(next.iter().copied().collect());
        seats.iter_mut().for_each(|seat| seat.voter = next.contains(&seat.id));
    }
    steps
}

const NOTHING: [Vec<u64>; 0] = [];

#[test]
fn a_cluster_grows_to_an_odd_number_of_voters() {
    assert_eq!(steps("1V"), NOTHING);
    assert_eq!(steps("1V 2l"), [vec![1, 2]]);
    assert_eq!(steps("1V 2V 3l"), [vec![1, 2, 3]]);
    assert_eq!(steps("1V 2l 3l"), [vec![1, 2, 3]]);
    assert_eq!(steps("1V 2V 3V 4l"), NOTHING);
    assert_eq!(steps("1V 2V 3V 4l 5l"), [vec![1, 2, 3, 4, 5]]);
    assert_eq!(steps("1V 2V 3V 4l 5l 6l 7l 8l").last(), Some(&vec![1, 2, 3, 4, 5, 6, 7]));
    // Not ready to vote yet.
    assert_eq!(steps("1V 2V 3V 4l+ 5l"), NOTHING);
}

#[test]
fn no_more_get_a_vote_than_are_to() {
    let next = |text, most| next_voters(1, &seats(text), most);
    assert_eq!(next("1V 2V 3V 4l 5l", 3), None);
    assert_eq!(next("1V 2l 3l 4l 5l", 3), Some(BTreeSet::from([1, 2, 3])));
    // Nobody loses a vote for it that survives a failure.
    assert_eq!(next("1V 2V 3V 4V 5V", 3), None);
    assert_eq!(next("1V 2V 3V 4V", 3), Some(BTreeSet::from([1, 2, 3])));
    assert_eq!(next("1V 2V 3V 4V 5V 6V 7V 8l 9l", 100), None);
}

#[test]
fn a_dead_voter_is_replaced_and_a_silent_one_is_waited_for() {
    assert_eq!(steps("1V 2V- 3V 4l"), NOTHING);
    assert_eq!(steps("1V 2Vx 3V 4l"), [vec![1, 3, 4]]);
    // Nobody to take the seat: three voters of which two are up are better than two.
    assert_eq!(steps("1V 2Vx 3V"), NOTHING);
    assert_eq!(steps("1V 2Vx 3V 4l+ 5l-"), NOTHING);
    // Two of five dead, nobody to replace them: of three, one more may fail.
    assert_eq!(steps("1V 2Vx 3V 4V 5Vx"), [vec![1, 3, 4]]);
    assert_eq!(steps("1V 2Vx 3V 4V 5V"), NOTHING);
    // Without a quorum nothing can be decided.
    assert_eq!(steps("1V 2Vx 3V- 4l"), NOTHING);
    // Back again, it is a learner, and votes only where it makes the number odd.
    assert_eq!(steps("1V 2l 3V 4V"), NOTHING);
}

#[test]
fn a_removed_voter_leaves_an_odd_number() {
    assert_eq!(steps("1V 2V 3V 4V"), [vec![1, 2, 3]]);
    assert_eq!(steps("1V 2V 3V 4V-"), NOTHING);
    assert_eq!(steps("1V 2V 3V 4Vx"), [vec![1, 2, 3]]);
    assert_eq!(steps("1V 2V- 3V 4V 5Vx"), NOTHING);
    // The seat of the one that is gone is given to a learner at once.
    assert_eq!(steps("1V 2V 4l"), [vec![1, 2, 4]]);
}

#[test]
fn voters_are_spread_over_zones() {
    assert_eq!(steps("1V/a 2V/a 3V/b 4l/c"), [vec![1, 3, 4]]);
    assert_eq!(steps("1V/a 2V/a 3V/a 4l/b"), [vec![1, 2, 4]]);
    assert_eq!(steps("1V/a 2V/a 3V/a 4l/b 5l/b").len(), 1);
    // Not while somebody is silent; the dead one's seat first, in the emptiest zone.
    assert_eq!(steps("1V/a 2V/a 3V-/b 4l/c"), NOTHING);
    assert_eq!(steps("1V/a 2V/b 3Vx/c 4l/a 5l/c"), [vec![1, 2, 5]]);
    // Each unlabelled member is on its own.
    assert_eq!(steps("1V 2V 3V 4l 5l-"), NOTHING);
}

#[test]
fn a_witness_votes() {
    assert_eq!(steps("1V 2V 3lw"), [vec![1, 2, 3]]);
    assert_eq!(steps("1V 2V 3V 4lw"), [vec![1, 2, 4]]);
}

fn health() -> impl Strategy<Value = Health> {
    prop_oneof![
        6 => Just(Health::Ready),
        1 => Just(Health::Behind),
        1 => Just(Health::Silent),
        2 => Just(Health::Dead),
    ]
}

fn seat(id: u64) -> impl Strategy<Value = Seat> {
    let zone = prop_oneof![Just(""), Just("a"), Just("b"), Just("c")].prop_map(str::to_owned);
    (zone, any::<bool>(), prop::bool::weighted(0.1), health()).prop_map(
        move |(zone, voter, witness, health)| Seat {
            id,
            zone,
            // 1 leads.
            voter: voter || id == 1,
            witness,
            health: if id == 1 { Health::Ready } else { health },
        },
    )
}

fn clusters() -> impl Strategy<Value = Vec<Seat>> {
    (1..=9u64)
        .prop_flat_map(|count| (1..=count).map(seat).collect::<Vec<_>>())
        .prop_filter("at most seven vote", |seats| {
            seats.iter().filter(|seat| seat.voter).count() <= VOTERS_MAX
        })
}

fn voters(seats: &[Seat]) -> BTreeSet<u64> {
    seats.iter().filter(|seat| seat.voter).map(|seat| seat.id).collect()
}

fn elect(seats: &mut [Seat], voters: &BTreeSet<u64>) {
    seats.iter_mut().for_each(|seat| seat.voter = voters.contains(&seat.id));
}

/// Steps to the end, and how many there were.
fn settle(seats: &mut [Seat]) -> usize {
    for count in 0..30 {
        match next_voters(1, seats, VOTERS_MAX) {
            Some(next) => elect(seats, &next),
            None => return count,
        }
    }
    panic!("it never ends: {seats:?}");
}

/// Members of each domain among these, squared and summed: smaller is more even.
fn unevenness(seats: &[Seat], chosen: &BTreeSet<u64>) -> usize {
    let mut domains: BTreeMap<(&str, u64), usize> = BTreeMap::new();
    for seat in seats.iter().filter(|seat| chosen.contains(&seat.id)) {
        *domains.entry(seat.domain()).or_default() += 1;
    }
    domains.values().map(|count| count * count).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn no_step_risks_the_quorum(mut seats in clusters()) {
        for _ in 0..30 {
            let Some(next) = next_voters(1, &seats, VOTERS_MAX) else { break };
            let before = voters(&seats);
            prop_assert!(next.contains(&1) && next.len() <= VOTERS_MAX);
            // A joint change needs a majority of both.
            prop_assert!(spare(&seats, &before).is_some());
            prop_assert!(spare(&seats, &next) >= spare(&seats, &before), "{before:?} {next:?}");
            let added: Vec<&Seat> =
                seats.iter().filter(|s| next.contains(&s.id) && !s.voter).collect();
            prop_assert!(added.len() <= 2 && added.iter().all(|s| s.health == Health::Ready));
            elect(&mut seats, &next);
        }
    }

    #[test]
    fn it_settles_and_short_silence_then_moves_nothing(mut seats in clusters(), who in 2..=9u64) {
        let moved = settle(&mut seats);
        prop_assert!(moved <= 9, "{moved}");
        let settled = voters(&seats);
        let Some(place) = seats.iter().position(|seat| seat.id == who) else { return Ok(()) };
        if seats[place].health != Health::Ready {
            return Ok(());
        }
        seats[place].health = Health::Silent;
        prop_assert_eq!(next_voters(1, &seats, VOTERS_MAX), None);
        seats[place].health = Health::Ready;
        prop_assert_eq!(next_voters(1, &seats, VOTERS_MAX), None);
        prop_assert_eq!(voters(&seats), settled);
    }

    #[test]
    fn the_dead_vote_only_where_nobody_can_take_their_seat(mut seats in clusters()) {
        prop_assume!(spare(&seats, &voters(&seats)).is_some());
        settle(&mut seats);
        let of = |dead: bool, voter: bool| {
            let wanted = move |s: &&Seat| (s.health == Health::Dead) == dead && s.voter == voter;
            seats.iter().filter(wanted).collect::<Vec<_>>()
        };
        let ready = of(false, false).iter().filter(|s| s.health == Health::Ready).count();
        // One learner that is left over makes the number even, and is no replacement for two.
        prop_assert!(of(true, true).is_empty() || ready <= 1, "{seats:?}");
    }

    #[test]
    fn all_being_well_the_voters_are_spread_with_the_fewest_moves(mut seats in clusters()) {
        for seat in &mut seats {
            seat.health = Health::Ready;
            seat.witness = false;
        }
        let (before, count) = (voters(&seats), best_count(seats.len(), VOTERS_MAX));
        settle(&mut seats);
        let after = voters(&seats);
        prop_assert_eq!(after.len(), count);
        let cost = |chosen: &BTreeSet<u64>| {
            (unevenness(&seats, chosen), chosen.difference(&before).count())
        };
        let best = (0..1u32 << seats.len())
            .map(|bits| {
                let ids = seats.iter().map(|seat| seat.id);
                ids.filter(|id| bits & (1 << (id - 1)) != 0).collect::<BTreeSet<u64>>()
            })
            .filter(|chosen| chosen.len() == count && chosen.contains(&1))
            .map(|chosen| cost(&chosen))
            .min();
        prop_assert_eq!(Some(cost(&after)), best);
    }
}
