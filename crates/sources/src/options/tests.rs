use super::*;

fn parse(kind: Kind, text: &str) -> Result<SourceOptions, String> {
    SourceOptions::parse(kind, text).map_err(|e| {
        // A name that no collection can have is refused as anywhere else.
        let expected = match text.contains(r#""collection": "users""#) {
            true => "42939",
            false => "22023",
        };
        assert_eq!(e.sqlstate(), expected, "{text}");
        assert!(e.hint().is_some_and(|hint| !hint.is_empty()), "{text}");
        e.to_string()
    })
}

#[test]
fn options_of_each_kind() {
    let kafka = parse(
        Kind::Kafka,
        r#"{"topics": ["pageview", "^order_.*"], "format": "json", "start": "earliest"}"#,
    );
    let kafka = kafka.unwrap_or_else(|e| panic!("{e}"));
    assert!(matches!(&kafka.what, What::Topics(t) if t.contains("order_1")));
    assert_eq!(
        (kafka.route, kafka.format),
        (Route::Topic, Format::Json(Shape::Auto))
    );
    assert_eq!(kafka.start, Start::Earliest);

    let kinesis = parse(
        Kind::Kinesis,
        r#"{"stream": "Events", "format": "avro", "framing": "confluent", "collection": null}"#,
    );
    let kinesis = kinesis.unwrap_or_else(|e| panic!("{e}"));
    assert!(matches!(&kinesis.what, What::Stream(name) if name == "Events"));
    assert!(matches!(&kinesis.route, Route::To(name) if name.as_str() == "events"));
    assert_eq!(kinesis.format, Format::Avro(Framing::Confluent));

    let files = parse(
        Kind::Files,
        r#"{"prefix": "/in/", "collection": "c", "format": "csv", "options": {"delimiter": ";"}}"#,
    );
    let files = files.unwrap_or_else(|e| panic!("{e}"));
    assert!(matches!(&files.what, What::Objects { prefix, .. } if prefix == "in"));
    assert!(matches!(&files.route, Route::To(name) if name.as_str() == "c"));
}

#[test]
fn wrong_options_say_what_is_valid() {
    for (kind, text, message) in [
        (
            Kind::Kafka,
            "[]",
            "options must be a JSON object, not an array",
        ),
        (Kind::Kafka, "{", "options are not valid JSON: "),
        (
            Kind::Kafka,
            "{}",
            "option \"topics\" must be an array of texts",
        ),
        (
            Kind::Kafka,
            r#"{"topics": "a"}"#,
            "option \"topics\" must be an array of texts",
        ),
        (
            Kind::Kafka,
            r#"{"topics": []}"#,
            "option \"topics\" names no topic",
        ),
        (
            Kind::Kafka,
            r#"{"topics": ["a"], "stream": "b"}"#,
            "unknown option \"stream\"",
        ),
        (
            Kind::Kafka,
            r#"{"topics": ["a"], "format": "xml"}"#,
            "unknown format \"xml\"",
        ),
        (
            Kind::Kafka,
            r#"{"topics": ["a"], "shape": "round"}"#,
            "unknown shape \"round\"",
        ),
        (
            Kind::Kafka,
            r#"{"topics": ["a"], "format": "avro", "shape": "flat"}"#,
            "format avro has no option \"shape\"",
        ),
        (
            Kind::Kafka,
            r#"{"topics": ["a"], "framing": "rakam"}"#,
            "format json has no option \"framing\"",
        ),
        (
            Kind::Kafka,
            r#"{"topics": ["a"], "start": "soon"}"#,
            "\"soon\" is not a place to read from",
        ),
        (
            Kind::Kafka,
            r#"{"topics": ["a"], "collection": 1}"#,
            "option \"collection\" must be a text",
        ),
        (
            Kind::Kafka,
            r#"{"topics": ["a"], "collection": "users"}"#,
            "collection name \"users\" is reserved",
        ),
        (Kind::Kinesis, "{}", "option \"stream\" is missing"),
        (
            Kind::Kinesis,
            r#"{"stream": "a b"}"#,
            "\"a b\" is not the name of a stream",
        ),
        (Kind::Files, "{}", "option \"collection\" is missing"),
        (
            Kind::Files,
            r#"{"collection": "c", "format": "orc"}"#,
            "unknown file format \"orc\"",
        ),
        (
            Kind::Files,
            r#"{"collection": "c", "start": "latest"}"#,
            "unknown option \"start\"",
        ),
    ] {
        let error = parse(kind, text).err().unwrap_or_default();
        assert!(error.starts_with(message), "{text}: {error}");
    }
    assert!(Kind::parse("kafka").is_ok() && Kind::parse("pulsar").is_err());
}

#[test]
fn starts() {
    let of = |kind, value: &str| {
        let what = match kind {
            Kind::Kafka => "\"topics\": [\"a\"]",
            _ => "\"stream\": \"s\"",
        };
        parse(kind, &format!("{{{what}, \"start\": {value}}}")).map(|o| o.start)
    };
    assert_eq!(of(Kind::Kafka, "\"latest\""), Ok(Start::Latest));
    assert_eq!(
        of(Kind::Kafka, "\"1970-01-01 00:00:01.5\""),
        Ok(Start::Time(1500))
    );
    assert_eq!(of(Kind::Kinesis, "2000"), Ok(Start::Time(2000)));
    let at = Position::At("495".to_owned());
    assert_eq!(
        of(Kind::Kinesis, r#"{"shardId-1": "495"}"#),
        Ok(Start::Splits(vec![("shardId-1".to_owned(), at)]))
    );
    assert_eq!(
        of(Kind::Kafka, r#"{"a/0": 7}"#),
        Ok(Start::Splits(vec![("a/0".to_owned(), Position::offset(7))]))
    );
    for (kind, wrong) in [
        (Kind::Kafka, r#"{"a": 7}"#),
        (Kind::Kafka, r#"{"a/0": -7}"#),
        (Kind::Kafka, "true"),
        (Kind::Kinesis, r#"{"s": "x"}"#),
    ] {
        assert!(of(kind, wrong).is_err(), "{wrong}");
    }
}

#[test]
fn targets_of_seek() {
    let of = |kind, text: &str| seek_target(kind, text).ok();
    assert_eq!(of(Kind::Kafka, "earliest"), Some(Start::Earliest));
    assert_eq!(of(Kind::Files, "earliest"), Some(Start::Earliest));
    assert_eq!(
        of(Kind::Kinesis, "1970-01-01T00:00:02Z"),
        Some(Start::Time(2000))
    );
    // What `rakam.offsets` shows.
    let after = Position::After("495".to_owned());
    assert_eq!(
        of(Kind::Kinesis, r#"{"s": 495}"#),
        Some(Start::Splits(vec![("s".to_owned(), after)]))
    );
    let one = |position| Some(Start::Splits(vec![("a/0".to_owned(), position)]));
    assert_eq!(of(Kind::Kafka, r#"{"a/0": 7}"#), one(Position::offset(7)));
    assert_eq!(of(Kind::Files, r#"{"a/0": 0}"#), one(Position::Beginning));
    for wrong in ["", "soon", "{", r#"{"a/0": 1.5}"#] {
        assert_eq!(of(Kind::Kafka, wrong), None, "{wrong}");
    }
}
