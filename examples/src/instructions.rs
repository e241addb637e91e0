//! Instruction data: records of prompts and answers, of which the answers are targets.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use clap::{Args, ValueEnum};
use instruct::{
    Chat, Encoded, Limit, Record, Row, Template, TooLong, batch, count_duplicates, encode, pack,
    read_records,
};
use models::Pretrained;
use peft::Batch;

use crate::date::DateArg;
use crate::outcome::Result;
use crate::texts::{Cut, Texts, evaluation_batch};

/// The options of how records become sequences of tokens.
#[derive(Args, Clone, Debug)]
pub struct Instructions {
    /// Records to evaluate on, in the form of --data [default: every twentieth record of --data]
    #[arg(long, value_name = "FILE", requires = "data")]
    eval_data: Option<PathBuf>,
    /// Template of prompts and answers
    #[arg(long, value_enum, value_name = "NAME", requires = "data")]
    template: Option<TemplateName>,
    /// Template of the prompt, in Jinja over the fields of a record; instead of --template
    #[arg(
        long,
        value_name = "TEXT",
        requires = "completion",
        conflicts_with = "template"
    )]
    prompt: Option<String>,
    /// Template of the answer, in Jinja over the fields of a record
    #[arg(long, value_name = "TEXT", requires = "prompt")]
    completion: Option<String>,
    /// What to do with records of more than --seq-len tokens
    #[arg(long, value_enum, value_name = "NAME", default_value_t = Long::Cut, requires = "data")]
    too_long: Long,
    #[command(flatten)]
    date: DateArg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TemplateName {
    /// Prompts of Stanford Alpaca; fields `instruction`, `input`, `output`
    Alpaca,
    /// `Question: ..`, `Answer: ..`; fields `question`, `answer`
    Gsm8k,
    /// Chat template of the model; field `messages`, `conversations` or another with turns
    Chat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Long {
    /// Cut off their ends
    Cut,
    /// Leave them out
    Drop,
    /// Fail with an error
    Refuse,
}

impl Instructions {
    /// Checks that there are records and a template.
    pub(crate) fn check(&self, data: &Path) -> Result<()> {
        self.check_template()?;
        self.records(data).map(drop)
    }

    fn check_template(&self) -> Result<()> {
        if self.prompt.is_none() && self.template.is_none() {
            return Err("--data needs --template, or --prompt and --completion".into());
        }
        Ok(())
    }

    /// The records to train and to evaluate on.
    fn records(&self, data: &Path) -> Result<[Vec<Record>; 2]> {
        let all = read_records(data)?;
        if let Some(eval) = &self.eval_data {
            return Ok([all, read_records(eval)?]);
        }
        if all.len() < 20 {
            return Err(format!(
                "`{}` has {} records, and one of 20 is held out to evaluate on; give others with --eval-data",
                data.display(),
                all.len()
            )
            .into());
        }
        let all = all.into_iter().enumerate();
        let (eval, train): (Vec<_>, Vec<_>) = all.partition(|(at, _)| at % 20 == 19);
        let records = |all: Vec<(usize, Record)>| all.into_iter().map(|(_, of)| of).collect();
        Ok([records(train), records(eval)])
    }

    /// Encodes the records and packs them into rows.
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
            return Err(models::Error::Text(models::TextError::SeqLen { seq_len, max }).into());
        }
        self.check_template()?;
        let special = lm.special_tokens()?;
        let template = match (&self.prompt, &self.completion, self.template) {
            (Some(prompt), Some(completion), _) => Template::fields(prompt, completion)?,
            (_, _, Some(TemplateName::Alpaca)) => Template::alpaca(),
            (_, _, Some(TemplateName::Gsm8k)) => Template::gsm8k(),
            (_, _, Some(TemplateName::Chat)) => {
                let chat = Chat::open(lm.dir(), &special)?;
                Template::Chat(match self.date.given() {
                    Some(now) => chat.with_now(now),
                    None => chat,
                })
            }
            _ => unreachable!("checked to be there"),
        };
        let [train, eval] = self.records(data)?;
        let limit = Limit::new(cut.seq_len).with_too_long(match self.too_long {
            Long::Cut => TooLong::Cut,
            Long::Drop => TooLong::Drop,
            Long::Refuse => TooLong::Refuse,
        });
        let tokenizer = lm.tokenizer()?;
        let encode = |records: &[Record], purpose: &str| {
            let encoded = encode(records, &template, tokenizer, &special, limit);
            encoded.map_err(|error| format!("{purpose} records: {error}"))
        };
        let train = encode(&train, "training")?;
        let eval = encode(&eval, "evaluation")?;
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
            n => format!("; {n} of them are training records too"),
        };
        Ok(Texts {
            train: batches(&train, cut.batch, usize::MAX, cut.seed)?,
            // Evaluation rows do not depend on the seed of training.
            task: batches(&eval, evaluation_batch(cut.seq_len), cut.eval_windows, 0)?,
            base: Vec::new(),
            records: Some([train.to_string(), eval.to_string() + &known]),
        })
    }
}
