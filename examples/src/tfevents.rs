//! Event files of TensorBoard: scalars by step.
//!
//! Records of TensorFlow (`tensorflow/core/lib/io/record_writer.h`) of messages of
//! `tensorflow/core/util/event.proto`.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use prost::Message;

/// A part of the name by which TensorBoard knows the files.
pub const NAME: &str = "events.out.tfevents";

/// A scalar, or the first event of a file, which has its version.
#[derive(Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

#[derive(Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Scalar>,
}

#[derive(Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// An event file.
#[derive(Debug)]
pub struct EventFile(File);

impl EventFile {
    /// Begins a file, in the place of another if there is one.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn create(path: &Path, wall_time: f64) -> io::Result<Self> {
        let mut events = Self(File::create(path)?);
        events.write(&Event {
            wall_time,
            step: 0,
            file_version: Some("brain.Event:2".into()),
            summary: None,
        })?;
        Ok(events)
    }

    /// Adds the scalars of a step, under their names.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn add(&mut self, wall_time: f64, step: usize, scalars: &[(&str, f64)]) -> io::Result<()> {
        let scalar = |&(tag, value): &(&str, f64)| Scalar {
            tag: tag.into(),
            simple_value: Some(value as f32),
        };
        let values = scalars.iter().map(scalar).collect();
        self.write(&Event {
            wall_time,
            step: step as i64,
            file_version: None,
            summary: Some(Summary { values }),
        })
    }

    fn write(&mut self, event: &Event) -> io::Result<()> {
        // At once: a reader, and a process that is killed, see whole records as a rule.
        self.0.write_all(&record(&event.encode_to_vec()))
    }
}

/// A record: length, its checksum, data, its checksum.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let [of_length, of_data] = [&length[..], data].map(|bytes| masked(bytes).to_le_bytes());
    [&length[..], &of_length, data, &of_data].concat()
}

/// The checksum of a record, which is that of its bytes but for sums of sums.
fn masked(bytes: &[u8]) -> u32 {
    let sum = crc32c::crc32c(bytes);
    sum.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes that TensorBoard's `EventFileWriter` writes.
    #[test]
    fn records_are_those_of_tensorboard() {
        let event = Event {
            wall_time: 1.5,
            step: 300,
            file_version: None,
            summary: Some(Summary {
                values: vec![Scalar {
                    tag: "loss".into(),
                    simple_value: Some(0.25),
                }],
            }),
        };
        let expected = "1b000000000000001a0d9e1309000000000000f83f10ac022a0d0a0b0a046c6f7373150000803e9908deed";
        let hex =
            |bytes: Vec<u8>| -> String { bytes.iter().map(|byte| format!("{byte:02x}")).collect() };
        assert_eq!(hex(record(&event.encode_to_vec())), expected);
    }
}
