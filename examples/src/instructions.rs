//! Instruction data: records whose prompts are given, and whose answers are learned.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use clap::{Args, ValueEnum};
use instruct::{
    Encoded, Limit, Record, Row, Template, TooLong, batch, count_duplicates, encode, pack,
    read_records,
};
use models::Pretrained;
use peft::Batch;

use crate::tuning::{Cut, Result, Texts};

/// The options of a program that say how records become texts.
#[derive(Args, Clone, Debug)]
pub struct Instructions {
    /// Records of the same kind to evaluate on [default: every twentieth of --data]
    #[arg(long, value_name = "FILE", requires = "data")]
    eval_data: Option<PathBuf>,
    /// What prompts and answers look like
    #[arg(long, value_enum, value_name = "NAME", requires = "data")]
    template: Option<TemplateName>,
    /// A template of your own for the prompt, in Jinja over the fields of a record
    #[arg(
        long,
        value_name = "TEXT",
        requires = "completion",
        conflicts_with = "template"
    )]
    prompt: Option<String>,
    /// The same for the answer
    #[arg(long, value_name = "TEXT", requires = "prompt")]
    completion: Option<String>,
    /// What becomes of records with more tokens than --seq-len
    #[arg(long, value_enum, value_name = "NAME", default_value_t = Long::Cut, requires = "data")]
    too_long: Long,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TemplateName {
    /// instruction, input, output: Stanford Alpaca's prompts
    Alpaca,
    /// question, answer: `Question: ..`, `Answer: ..`
    Gsm8k,
    /// messages or conversations: the chat template of the model's directory
    Chat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Long {
    /// Their ends are cut off
    Cut,
    /// They are left out
    Drop,
    /// They are an error
    Refuse,
}

impl Instructions {
    /// The records as rows of texts, packed.
    pub(crate) fn texts(
        &self,
        data: &Path,
        cut: &Cut,
        lm: &Pretrained,
        device: &Device,
    ) -> Result<Texts> {
        let max = lm.model.config().max_seq_len();
        if !(2..=max).contains(&cut.seq_len) {
            let seq_len = cut.seq_len;
            return Err(models::Error::SeqLen { seq_len, max }.into());
        }
        let special = lm.special_tokens()?;
        let template = match (&self.prompt, &self.completion, self.template) {
            (Some(prompt), Some(completion), _) => Template::fields(prompt, completion)?,
            (_, _, Some(TemplateName::Alpaca)) => Template::alpaca(),
            (_, _, Some(TemplateName::Gsm8k)) => Template::gsm8k(),
            (_, _, Some(TemplateName::Chat)) => Template::chat(lm.dir(), &special)?,
            _ => return Err("--data takes a --template, or --prompt and --completion".into()),
        };
        let (train, eval): (Vec<Record>, Vec<Record>) = match &self.eval_data {
            Some(eval) => (read_records(data)?, read_records(eval)?),
            None => {
                let all = read_records(data)?;
                if all.len() < 20 {
                    let problem = "fewer than the 20 of which one is kept to evaluate on; name others with --eval-data";
                    return Err(format!("{} records, {problem}", all.len()).into());
                }
                let all = all.into_iter().enumerate();
                let (eval, train): (Vec<_>, Vec<_>) = all.partition(|(at, _)| at % 20 == 19);
                let records = |all: Vec<(usize, Record)>| all.into_iter().map(|(_, of)| of);
                (records(train).collect(), records(eval).collect())
            }
        };
        let limit = Limit::new(cut.seq_len).with_too_long(match self.too_long {
            Long::Cut => TooLong::Cut,
            Long::Drop => TooLong::Drop,
            Long::Refuse => TooLong::Refuse,
        });
        let tokenizer = lm.tokenizer()?;
        let encode = |records: &[Record], what: &str| {
            let encoded = encode(records, &template, tokenizer, &special, limit);
            encoded.map_err(|error| format!("{what}: {error}"))
        };
        let train = encode(&train, "to train on")?;
        let eval = encode(&eval, "to evaluate on")?;
        let padding = lm.padding()?;
        let batches = |encoded: &Encoded, size, most, seed| -> Result<Vec<Batch>> {
            let rows = pack(&encoded.examples, cut.seq_len, padding, seed)?;
            let rows: Vec<Row> = rows.into_iter().take(most).collect();
            let batches = rows.chunks(size).map(|rows| batch(rows, device));
            Ok(batches.collect::<instruct::Result<_>>()?)
        };
        let n_known = count_duplicates(&train.examples, &eval.examples);
        let known = match n_known {
            0 => String::new(),
            n => format!("; {n} of them are among those to train on"),
        };
        Ok(Texts {
            train: batches(&train, cut.batch, usize::MAX, cut.seed)?,
            // The seed of training says nothing about what is measured.
            task: batches(&eval, (1024 / cut.seq_len).max(1), cut.eval_windows, 0)?,
            base: Vec::new(),
            records: Some([train.to_string(), eval.to_string() + &known]),
        })
    }
}
