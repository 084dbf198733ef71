//! Reads a topic and counts its records, as any consumer has to before it makes anything of them: the same client as
//! rakam's, with the same settings, and one call a record.
//!
//! counter BROKERS TOPIC PARTITIONS RECORDS: reads so many records, and prints how many bytes their values have.

use std::error::Error;
use std::time::Duration;

use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

/// No record for so long: there are none.
const PATIENCE: Duration = Duration::from_secs(60);

const SETTINGS: [(&str, &str); 9] = [
    ("group.id", "counter"),
    ("enable.auto.commit", "false"),
    ("enable.auto.offset.store", "false"),
    ("isolation.level", "read_committed"),
    ("check.crcs", "true"),
    ("queued.max.messages.kbytes", "16384"),
    ("queued.min.messages", "20000"),
    ("fetch.wait.max.ms", "100"),
    ("fetch.queue.backoff.ms", "10"),
];

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [brokers, topic, partitions, records] = arguments.as_slice() else {
        return Err("usage: counter BROKERS TOPIC PARTITIONS RECORDS".into());
    };
    let (partitions, records): (i32, u64) = (partitions.parse()?, records.parse()?);
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    for (name, value) in SETTINGS {
        config.set(name, value);
    }
    let consumer: BaseConsumer = config.create()?;
    let mut all = TopicPartitionList::new();
    for partition in 0..partitions {
        all.add_partition_offset(topic, partition, Offset::Beginning)?;
    }
    consumer.assign(&all)?;
    let (mut count, mut bytes) = (0, 0);
    while count < records {
        let Some(message) = consumer.poll(PATIENCE) else {
            return Err(format!("{count} records have come").into());
        };
        bytes += message?.payload_len();
        count += 1;
    }
    println!("{bytes}");
    Ok(())
}
