//! Which splits are to be read next, from what there is and what was read: a decision without I/O.
//!
//! A split is read after all its parents: of a key that moved to another shard the older events come first, and a parent's
//! last batch is stored before the first of its children.

use std::collections::{HashMap, HashSet};

use crate::source::{Split, Start};

/// What the checkpoint table says of a split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Being read, or stopped: either way not at its end.
    Open,
    Ended,
}

/// Splits to note in the checkpoint table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// To be read from where the source starts.
    pub at_start: Vec<Split>,
    /// To be read from their oldest record.
    pub from_beginning: Vec<Split>,
    /// Counted as read: they had ended before the source starts.
    pub ended: Vec<String>,
    /// Noted as open, and not there any more.
    pub gone: Vec<String>,
}

/// Plans from the splits that there are, those that are noted, and the source's start. `begins`: no plan of this source was
/// stored before. That nothing is noted does not tell: at its start the source may have had no splits yet, and those that came
/// to be since are read from their oldest record, wherever it starts.
pub fn plan(
    listed: &[Split],
    noted: &HashMap<String, Progress>,
    start: &Start,
    begins: bool,
) -> Plan {
    let mut plan = Plan::default();
    let there: HashSet<&str> = listed.iter().map(|split| split.id.as_str()).collect();
    let named: HashSet<&str> = match start {
        Start::Splits(splits) => splits.iter().map(|(id, _)| id.as_str()).collect(),
        _ => HashSet::new(),
    };
    let before_named = ancestors(listed, named.iter().copied());
    let before_noted = ancestors(listed, noted.keys().map(String::as_str));
    for split in listed.iter().filter(|split| !noted.contains_key(&split.id)) {
        let waits = split.parents.iter().any(|parent| match noted.get(parent) {
            Some(progress) => *progress == Progress::Open,
            // One that aged out of the stream has nothing to wait for.
            None => there.contains(parent.as_str()),
        });
        let id = split.id.as_str();
        match start {
            // Its children are read already.
            _ if before_noted.contains(id) => plan.ended.push(split.id.clone()),
            Start::Latest if begins && split.closed => plan.ended.push(split.id.clone()),
            Start::Latest if begins => plan.at_start.push(split.clone()),
            Start::Splits(_) if begins && before_named.contains(id) => {
                plan.ended.push(split.id.clone());
            }
            Start::Splits(_) if begins && named.contains(id) => {
                plan.at_start.push(split.clone());
            }
            _ if waits => {}
            // One that is behind others may be older than the seek that moved the start.
            Start::Time(_) if begins || !split.parents.is_empty() => {
                plan.at_start.push(split.clone());
            }
            // What came to be after the start has nothing from before it, whatever time its producers give.
            _ => plan.from_beginning.push(split.clone()),
        }
    }
    let mut gone: Vec<String> = noted
        .iter()
        .filter(|(id, progress)| **progress == Progress::Open && !there.contains(id.as_str()))
        .map(|(id, _)| id.clone())
        .collect();
    gone.sort();
    plan.gone = gone;
    plan
}

/// The splits that come before these, and are not among them.
fn ancestors<'a>(listed: &'a [Split], of: impl Iterator<Item = &'a str>) -> HashSet<&'a str> {
    let of: HashSet<&str> = of.collect();
    let by_id: HashMap<&str, &Split> = listed.iter().map(|s| (s.id.as_str(), s)).collect();
    let mut found = HashSet::new();
    let mut open: Vec<&str> = of.iter().copied().collect();
    while let Some(id) = open.pop() {
        for parent in by_id.get(id).into_iter().flat_map(|split| &split.parents) {
            if !of.contains(parent.as_str()) && found.insert(parent.as_str()) {
                open.push(parent);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::Position;

    /// `a` and `b` were merged into `c`, `c` was split into `d` and `e`; `f` is apart.
    fn shards() -> Vec<Split> {
        [
            ("a", "", true),
            ("b", "", true),
            ("c", "a b", true),
            ("d", "c", false),
            ("e", "c", false),
            ("f", "aged", false),
        ]
        .into_iter()
        .map(|(id, parents, closed)| Split {
            id: id.to_owned(),
            parents: parents.split_whitespace().map(str::to_owned).collect(),
            closed,
        })
        .collect()
    }

    /// At the start, from the beginning, ended, gone; `noted` is `a+` for open, `a.` for ended, and empty: the source begins.
    fn planned(noted: &str, start: &Start) -> [String; 4] {
        planned_when(noted.is_empty(), noted, start)
    }

    fn planned_when(begins: bool, noted: &str, start: &Start) -> [String; 4] {
        let noted = noted
            .split_whitespace()
            .map(|split| {
                let progress = match split.ends_with('.') {
                    true => Progress::Ended,
                    false => Progress::Open,
                };
                (split[..split.len() - 1].to_owned(), progress)
            })
            .collect();
        let plan = plan(&shards(), &noted, start, begins);
        let ids =
            |splits: Vec<Split>| -> Vec<String> { splits.into_iter().map(|s| s.id).collect() };
        [
            ids(plan.at_start),
            ids(plan.from_beginning),
            plan.ended,
            plan.gone,
        ]
        .map(|ids| ids.join(" "))
    }

    #[test]
    fn parents_come_before_children() {
        let earliest = &Start::Earliest;
        assert_eq!(planned("", earliest), ["", "a b f", "", ""]);
        assert_eq!(planned("a+ b. f+", earliest), ["", "", "", ""]);
        assert_eq!(planned("a. b. f+", earliest), ["", "c", "", ""]);
        assert_eq!(planned("a. b. c+ f+", earliest), ["", "", "", ""]);
        assert_eq!(planned("a. b. c. f+", earliest), ["", "d e", "", ""]);
        // Nothing is read after its children.
        assert_eq!(planned("c+ f+", earliest), ["", "", "a b", ""]);
    }

    #[test]
    fn each_start() {
        assert_eq!(planned("", &Start::Latest), ["d e f", "", "a b c", ""]);
        assert_eq!(planned("a. b. c. d+ f+", &Start::Latest), ["", "e", "", ""]);
        assert_eq!(planned("", &Start::Time(5)), ["a b f", "", "", ""]);
        assert_eq!(planned("a. b. f+", &Start::Time(5)), ["c", "", "", ""]);
        let at = |id: &str| Start::Splits(vec![(id.to_owned(), Position::At("1".into()))]);
        assert_eq!(planned("", &at("d")), ["d", "f", "a b c", ""]);
        assert_eq!(planned("a. b. c. d+ f+", &at("d")), ["", "e", "", ""]);
        assert_eq!(planned("", &at("c")), ["c", "f", "a b", ""]);
    }

    #[test]
    fn what_came_to_be_after_the_start_is_read_whole() {
        let at = |id: &str| Start::Splits(vec![(id.to_owned(), Position::At("1".into()))]);
        for start in [Start::Earliest, Start::Latest, at("d")] {
            assert_eq!(planned_when(false, "", &start), ["", "a b f", "", ""]);
        }
        // Time is of the start only, and of what is behind others.
        let found = planned_when(false, "", &Start::Time(5));
        assert_eq!(found, ["f", "a b", "", ""]);
    }

    #[test]
    fn what_is_gone_is_told() {
        let noted = "a. b. c. d+ e+ f+ x+ w+ y.";
        assert_eq!(planned(noted, &Start::Earliest), ["", "", "", "w x"]);
    }
}
