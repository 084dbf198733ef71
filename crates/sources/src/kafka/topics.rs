//! Which partitions the topics of a source have.

use regex::Regex;

use super::Partition;
use crate::error::SourceError;
use crate::source::Split;

/// The topics of a source: names, and patterns that begin with `^`.
#[derive(Debug, Clone)]
pub struct Topics {
    names: Vec<String>,
    patterns: Vec<Regex>,
}

impl Topics {
    pub fn parse<'a>(topics: impl IntoIterator<Item = &'a str>) -> Result<Self, SourceError> {
        let (mut names, mut patterns) = (Vec::new(), Vec::new());
        for topic in topics {
            if topic.starts_with('^') {
                let pattern = Regex::new(topic).map_err(|error| {
                    // The last line says what is wrong, those before it show where.
                    let error = error.to_string();
                    let reason = error.lines().last().unwrap_or_default();
                    let reason = reason.trim_start_matches("error: ");
                    SourceError::option(
                        format!("\"{topic}\" is not a valid pattern of topics: {reason}"),
                        "What begins with ^ is a regular expression.",
                    )
                })?;
                patterns.push(pattern);
            } else if is_topic(topic) {
                names.push(topic.to_owned());
            } else {
                return Err(SourceError::option(
                    format!("\"{topic}\" is not the name of a topic"),
                    "A topic has up to 249 letters, digits, dots, underscores and hyphens; a pattern begins with ^.",
                ));
            }
        }
        if names.is_empty() && patterns.is_empty() {
            return Err(SourceError::option(
                "option \"topics\" names no topic",
                "Give topics, or patterns that begin with ^: {\"topics\": [\"pageview\", \"^order_.*\"]}.",
            ));
        }
        Ok(Self { names, patterns })
    }

    /// Whether the whole list of topics is needed.
    pub fn has_patterns(&self) -> bool {
        !self.patterns.is_empty()
    }

    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Whether a topic is one of the source's. Kafka's own topics (`__…`) are by name only.
    pub fn contains(&self, topic: &str) -> bool {
        self.names.iter().any(|name| name == topic)
            || !topic.starts_with("__") && self.patterns.iter().any(|p| p.is_match(topic))
    }

    /// The partitions of the source, from topics and how many partitions each has.
    pub fn splits(&self, cluster: &[(String, Vec<i32>)]) -> Vec<Split> {
        let mut partitions: Vec<Partition> = cluster
            .iter()
            .filter(|(topic, _)| self.contains(topic))
            .flat_map(|(topic, numbers)| {
                numbers.iter().map(|&number| Partition {
                    topic: topic.clone(),
                    number,
                })
            })
            .collect();
        partitions.sort();
        partitions.dedup();
        partitions
            .iter()
            .map(|partition| Split {
                id: partition.split(),
                ..Split::default()
            })
            .collect()
    }
}

fn is_topic(name: &str) -> bool {
    (1..=249).contains(&name.len())
        && !matches!(name, "." | "..")
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_patterns() {
        let topics = Topics::parse(["page", "^order_.*", "__own", "^.*_offsets$"]);
        let topics = topics.unwrap_or_else(|e| panic!("{e}"));
        assert!(topics.has_patterns());
        for (topic, expected) in [
            ("page", true),
            ("pages", false),
            ("order_a", true),
            ("my_order_a", false),
            ("__own", true),
            ("my_offsets", true),
            ("__consumer_offsets", false),
        ] {
            assert_eq!(topics.contains(topic), expected, "{topic}");
        }
        let cluster = [
            ("order_b".to_owned(), vec![1, 0]),
            ("other".to_owned(), vec![0]),
            ("page".to_owned(), (0..11).collect()),
        ];
        let ids: Vec<String> = topics.splits(&cluster).into_iter().map(|s| s.id).collect();
        assert_eq!(ids.len(), 13);
        assert_eq!(ids[..3], ["order_b/0", "order_b/1", "page/0"]);
        // By number, not by text.
        assert_eq!(ids[12], "page/10");
        for wrong in [&[][..], &["^("], &["a b"], &[""], &["."]] {
            let error = Topics::parse(wrong.iter().copied());
            assert!(error.is_err_and(|e| e.sqlstate() == "22023"), "{wrong:?}");
        }
    }

    #[test]
    fn splits_are_partitions() {
        for (split, expected) in [
            ("a/0", Some(("a", 0))),
            ("a.b_c-d/12", Some(("a.b_c-d", 12))),
            ("a", None),
            ("/1", None),
            ("a/-1", None),
            ("a/x", None),
        ] {
            let parsed = Partition::parse(split).ok();
            let parsed = parsed.as_ref().map(|p| (p.topic.as_str(), p.number));
            assert_eq!(parsed, expected, "{split}");
        }
    }
}
